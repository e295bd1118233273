// Replays parity cases (one safetensors file each: weights, inputs, and what a reference implementation computed from them)
// and checks gradients by finite differences. Used by the tests of the models; plain C99 over the public half of mil.h.
//
// A case's metadata: `model` and `config` are what mil_create takes, `mode` eval or train, `loss` ce, bce or model, `target`
// the label. Its tensors: weight.K, in.K (in.rand.K a random draw, in.cotangent.K a cotangent of out.K), out.K, grad.K, after.K.
// A case holds when for each out., grad. and after. tensor, with r the reference and x the library's value in float32,
//   max|x - r| <= a max|r| + b     float: a = 1e-4 (grad.: 1e-3), b = 1e-6     double: a = 1e-6, b = 1e-9
// In double what is left is the reference's rounding to float32, 6e-8 of each value.
#ifndef REPLAY_H
#define REPLAY_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { REPLAY_EXTRAS = 16, REPLAY_LABELS = 64 };

typedef struct replay {
    mil_context *ctx;
    mil_tensors *file;
    mil_model   *model;
    mil_tape    *tape;
    mil_bag      bag;
    mil_target   target;
    mil_outputs  out;
    mil_named_tensor extra[REPLAY_EXTRAS];
    mil_real    *features;                                 // the case's features as mil_real
    int          training, has_target;
    int64_t      labels[REPLAY_LABELS];
    double       values[REPLAY_LABELS];
    double       err;                                      // the worst error as a share of what is allowed
    char         worst[160];                               // its tensor
    char         why[320];                                 // what failed first; "" while the case holds
} replay;

static void replay_fail(replay *r, const char *tensor, const char *why)
{
    if (!r->why[0]) snprintf(r->why, sizeof r->why, "%s%s%s", tensor, tensor[0] ? ": " : "", why);
}

// The text after "prefix" in name, or NULL.
static const char *replay_after(const char *name, const char *prefix)
{
    const size_t n = strlen(prefix);
    return strncmp(name, prefix, n) == 0 ? name + n : NULL;
}

static double replay_value(const mil_tensor *t, int64_t i)
{
    const char *at = (const char *)t->data + (size_t)i * mil_dtype_size(t->dtype);
    float f;
    double d;
    int64_t l;
    int32_t n;
    switch (t->dtype) {
    case MIL_F32: memcpy(&f, at, sizeof f); return (double)f;
    case MIL_F64: memcpy(&d, at, sizeof d); return d;
    case MIL_I64: memcpy(&l, at, sizeof l); return (double)l;
    case MIL_I32: memcpy(&n, at, sizeof n); return (double)n;
    case MIL_BOOL:
    case MIL_U8:  return (double)*(const unsigned char *)at;
    default:      return (double)NAN;
    }
}

static int replay_masked(double v) { return v <= -3.402823e38; }           // minus infinity or the most negative float

// x against tensor t of the case.
static void replay_compare(replay *r, const char *name, const mil_tensor *t, const mil_real *x, double a, double b)
{
    const int64_t count = mil_tensor_count(t);
    double top = 0, worst = 0;
    for (int64_t i = 0; i < count; i++) {
        const double v = replay_value(t, i);
        if (!replay_masked(v) && fabs(v) > top) top = fabs(v);
    }
    for (int64_t i = 0; i < count; i++) {
        const double v = replay_value(t, i), y = (double)x[i];
        double err = fabs(y - v);
        if (replay_masked(v)) err = replay_masked(y) ? 0 : (double)INFINITY;
        if (v != v && y != y) err = 0;
        if (!(err <= worst)) worst = err;
        if (worst != worst) break;
    }
    const double share = worst / (a * top + b);
    if (!(share <= r->err)) {
        r->err = share;
        snprintf(r->worst, sizeof r->worst, "%s", name);
    }
    if (!(share <= 1)) {
        char text[120];
        snprintf(text, sizeof text, "off by %.3g where %.3g is allowed", worst, a * top + b);
        replay_fail(r, name, text);
    }
}

static void replay_compare_node(replay *r, const char *name, const mil_tensor *t, mil_node *node, double a, double b)
{
    const int64_t count = mil_tensor_count(t);
    int same = node != NULL, k = 0;                        // but for axes of length 1: a reference drops them here and there
    for (int i = 0; same && i < t->rank; i++) {
        if (t->shape[i] == 1) continue;
        while (k < node->rank && node->shape[k] == 1) k++;
        same = k < node->rank && node->shape[k++] == t->shape[i];
    }
    while (same && k < node->rank) same = node->shape[k++] == 1;
    if (!same) {
        replay_fail(r, name, node ? "has another shape" : "is not there");
        return;
    }
    mil_real *x = (mil_real *)calloc((size_t)count + 1, sizeof *x);
    if (mil_node_read(node, x, count) != MIL_OK) replay_fail(r, name, mil_error(r->ctx));
    else replay_compare(r, name, t, x, a, b);
    free(x);
}

static int  replay_make(replay *r, mil_context *ctx, const char *name, const char *options, int64_t B, int64_t N, const int64_t *labels, uint64_t seed);
static void replay_run(replay *r);
static void replay_differences(replay *r);

static void replay_free(replay *r)
{
    (void)replay_make, (void)replay_run, (void)replay_differences;     // used or not
    mil_tape_free(r->tape);
    mil_model_free(r->model);
    mil_tensors_free(r->file);
    free(r->features);
    r->tape = NULL;
    r->model = NULL;
    r->file = NULL;
    r->features = NULL;
}

// `target` and `loss` of the metadata: 3, [1, 0], 0.5.
static void replay_target(replay *r, const char *loss, const char *text, int64_t bags)
{
    int count = 0;
    if (!text || !loss) return;
    if (*text == '[') text++;
    while (count < REPLAY_LABELS) {
        char *end;
        const double v = strtod(text, &end);
        if (end == text) break;
        r->values[count] = v;
        r->labels[count++] = (int64_t)v;
        text = end + strspn(end, " ,");
    }
    if (count == 0) return;
    r->has_target = 1;
    r->target = mil_target_class(r->labels[0]);
    r->target.count = count;
    if (strcmp(loss, "bce") == 0) {
        r->target.loss = MIL_LOSS_BCE;
        r->target.value = r->values[0];
        if (count > 1) r->target.values = r->values;
    } else if (bags > 1) r->target.labels = r->labels;
}

static void replay_tensors(replay *r)
{
    for (int64_t i = 0; i < mil_tensors_count(r->file); i++) {
        const char *name = mil_tensors_name(r->file, i), *key;
        const mil_tensor *t = mil_tensors_at(r->file, i);
        if ((key = replay_after(name, "weight."))) {
            mil_param *p = mil_model_find(r->model, key);
            int same = p && p->rank == t->rank;
            for (int a = 0; same && a < t->rank; a++) same = p->shape[a] == t->shape[a];
            if (!same) {
                replay_fail(r, name, p ? "has another shape in the model" : "is not in the model");
                continue;
            }
            if (p->dtype == MIL_I64) {
                for (int64_t k = 0; k < p->count; k++) ((int64_t *)p->data)[k] = (int64_t)replay_value(t, k);
                continue;
            }
            mil_real *values = (mil_real *)calloc((size_t)p->count, sizeof *values);
            for (int64_t k = 0; k < p->count; k++) values[k] = (mil_real)replay_value(t, k);
            if (mil_param_write(p, values, p->count) != MIL_OK) replay_fail(r, name, mil_error(r->ctx));
            free(values);
        } else if (replay_after(name, "in.cotangent.") || replay_after(name, "in.rand.")) {
            continue;
        } else if (strcmp(name, "in.features") == 0) {
            const int64_t count = mil_tensor_count(t);
            r->features = (mil_real *)calloc((size_t)count + 1, sizeof *r->features);
            for (int64_t k = 0; k < count; k++) r->features[k] = (mil_real)replay_value(t, k);
            r->bag.features = mil_tensor_make(r->features, MIL_REAL_DTYPE, t->rank, t->shape);
        } else if (strcmp(name, "in.mask") == 0) r->bag.mask = *t;
        else if (strcmp(name, "in.coords") == 0) r->bag.coords = *t;
        else if ((key = replay_after(name, "in.")) && r->bag.extra_count < REPLAY_EXTRAS) {
            r->extra[r->bag.extra_count].name = key;
            r->extra[r->bag.extra_count++].tensor = *t;
            r->bag.extra = r->extra;
        }
    }
}

// Each parameter that the model has must be among the case's weights.
static void replay_all_there(replay *r)
{
    const char *prefix = mil_model_architecture(r->model)->prefix;
    for (int64_t i = 0; i < mil_model_param_count(r->model); i++) {
        char name[320];
        const mil_param *p = mil_model_param(r->model, i);
        int found = 0;
        for (int64_t k = 0; k < mil_tensors_count(r->file) && !found; k++) {
            const char *key = replay_after(mil_tensors_name(r->file, k), "weight.");
            found = key && mil_model_find(r->model, key) == p;
        }
        snprintf(name, sizeof name, "weight.%s%s", prefix, p->key);
        if (!found) replay_fail(r, name, "is in the model and not in the case");
    }
}

// Opens a case and makes its model; the tape is empty. 0 and r->why on failure.
static int replay_open(replay *r, mil_context *ctx, const char *path)
{
    memset(r, 0, sizeof *r);
    r->ctx = ctx;
    if (mil_tensors_open(ctx, path, MIL_FILE_READ, &r->file) != MIL_OK) {
        replay_fail(r, "", mil_error(ctx));
        return 0;
    }
    const char *name = mil_tensors_meta(r->file, "model"), *config = mil_tensors_meta(r->file, "config"), *mode = mil_tensors_meta(r->file, "mode");
    r->training = mode && strcmp(mode, "train") == 0;
    r->model = name ? mil_create(ctx, name, config) : NULL;
    if (!r->model || mil_tape_create(ctx, &r->tape) != MIL_OK) {
        replay_fail(r, "", name ? mil_error(ctx) : "not a case");
        return 0;
    }
    replay_tensors(r);
    replay_all_there(r);
    replay_target(r, mil_tensors_meta(r->file, "loss"), mil_tensors_meta(r->file, "target"), r->bag.features.rank == 3 ? r->bag.features.shape[0] : 1);
    return !r->why[0];
}

// Records the forward pass on the empty tape.
static int replay_record(replay *r)
{
    mil_tape_training(r->tape, r->training);
    mil_tape_set(r->tape, MIL_TAPE_INPUT_GRADS, r->training);
    mil_tape_seed(r->tape, 1, 1);
    for (int64_t i = 0; r->file && i < mil_tensors_count(r->file); i++) {
        const char *key = replay_after(mil_tensors_name(r->file, i), "in.rand.");
        if (key) mil_tape_draw(r->tape, key, mil_tensors_at(r->file, i));
    }
    if (mil_model_record(r->tape, r->model, &r->bag, r->has_target ? &r->target : NULL, &r->out) == MIL_OK) return 1;
    mil_tape_run(r->tape);
    replay_fail(r, "", mil_error(r->ctx));
    return 0;
}

// The gradient by a parameter, or by the features.
static mil_node *replay_grad(replay *r, const char *key)
{
    if (strcmp(key, "in.features") == 0) return mil_node_grad(r->out.features);
    mil_param *p = mil_model_find(r->model, key);
    return p ? mil_node_grad(mil_use(r->tape, p)) : NULL;
}

static void replay_compare_grad(replay *r, const char *name, const char *key, const mil_tensor *t)
{
    mil_node *g = replay_grad(r, key);
    const int64_t count = mil_tensor_count(t);
    if (g && g->count != count) {
        replay_fail(r, name, "has another shape");
        return;
    }
    if (!g && strcmp(key, "in.features") != 0 && !mil_model_find(r->model, key)) {
        replay_fail(r, name, "is not in the model");
        return;
    }
    mil_real *x = (mil_real *)calloc((size_t)count + 1, sizeof *x);    // without a gradient: zeros, the loss does not depend on it
    if (g && mil_node_read(g, x, count) != MIL_OK) replay_fail(r, name, mil_error(r->ctx));
    else replay_compare(r, name, t, x, MIL_REAL_IS_FLOAT ? 1e-3 : 1e-6, MIL_REAL_IS_FLOAT ? 1e-6 : 1e-9);
    free(x);
}

// A parameter without a gradient in the case has none here, or zeros.
static void replay_no_grad(replay *r, mil_param *p)
{
    mil_node *g = mil_node_grad(mil_use(r->tape, p));
    for (int64_t i = 0; g && i < mil_tensors_count(r->file); i++) {
        const char *key = replay_after(mil_tensors_name(r->file, i), "grad.");
        if (key && mil_model_find(r->model, key) == p) return;
    }
    if (!g) return;
    mil_real *x = (mil_real *)calloc((size_t)p->count + 1, sizeof *x);
    if (mil_node_read(g, x, p->count) != MIL_OK) replay_fail(r, p->key, mil_error(r->ctx));
    for (int64_t i = 0; i < p->count; i++)
        if (x[i] != 0) replay_fail(r, p->key, "has a gradient here and none in the case");
    free(x);
}

// Runs the case forward and backward and compares. r->why is "" when it holds.
static void replay_run(replay *r)
{
    const int single = MIL_REAL_IS_FLOAT;
    mil_node *y[64], *dy[64];
    int cotangents = 0;
    if (!replay_record(r)) return;
    for (int64_t i = 0; i < mil_tensors_count(r->file); i++) {
        const char *key = replay_after(mil_tensors_name(r->file, i), "out.");
        if (key) mil_node_keep(mil_outputs_find(&r->out, key));
        key = replay_after(mil_tensors_name(r->file, i), "in.cotangent.");
        if (!key || cotangents == 64) continue;
        y[cotangents] = mil_outputs_find(&r->out, key);
        dy[cotangents++] = mil_affine(mil_input(r->tape, key, mil_tensors_at(r->file, i)), 1, 0);
    }
    if (r->training && cotangents) mil_tape_backward_from(r->tape, y, dy, cotangents);
    else if (r->training) mil_tape_backward(r->tape, r->out.loss);
    for (int64_t i = 0; r->training && i < mil_model_param_count(r->model); i++)
        mil_node_keep(mil_node_grad(mil_use(r->tape, mil_model_param(r->model, i))));
    mil_node_keep(mil_node_grad(r->out.features));
    if (mil_tape_run(r->tape) != MIL_OK) {
        replay_fail(r, "", mil_error(r->ctx));
        return;
    }
    for (int64_t i = 0; i < mil_tensors_count(r->file); i++) {
        const char *name = mil_tensors_name(r->file, i), *key;
        const mil_tensor *t = mil_tensors_at(r->file, i);
        if ((key = replay_after(name, "out."))) replay_compare_node(r, name, t, mil_outputs_find(&r->out, key), single ? 1e-4 : 1e-6, single ? 1e-6 : 1e-9);
        if ((key = replay_after(name, "grad."))) replay_compare_grad(r, name, key, t);
    }
    for (int64_t i = 0; r->training && i < mil_model_param_count(r->model); i++) replay_no_grad(r, mil_model_param(r->model, i));
    for (int64_t i = 0; i < mil_tensors_count(r->file); i++) {
        const char *name = mil_tensors_name(r->file, i), *key = replay_after(name, "after.");
        if (!key) continue;
        const mil_param *p = mil_model_find(r->model, key);
        const mil_tensor *t = mil_tensors_at(r->file, i);
        mil_real *x = p && p->count == mil_tensor_count(t) ? (mil_real *)calloc((size_t)p->count, sizeof *x) : NULL;
        if (!x || mil_param_read(p, x, p->count) != MIL_OK) replay_fail(r, name, "is not in the model");
        else replay_compare(r, name, t, x, single ? 1e-4 : 1e-6, single ? 1e-6 : 1e-9);
        free(x);
    }
}

// ---- finite differences ----
// Records forward on a tape of its own and compares the gradient of every parameter's every element, and of every feature,
// with (loss(v + h) - loss(v - h)) / 2h, h = 1e-6: in double what is left is 1e-9 or so, unless a kink lies in between.
static double replay_loss(replay *r, mil_tape *tape, mil_node *loss)
{
    mil_real v = 0;
    if (mil_tape_rerun(tape) != MIL_OK || mil_node_read(loss, &v, 1) != MIL_OK) replay_fail(r, "", mil_error(r->ctx));
    return (double)v;
}

static void replay_slope(replay *r, mil_tape *tape, mil_node *loss, mil_param *p, mil_real *v, const mil_real *g, int64_t count, const char *name)
{
    double top = 1;
    for (int64_t i = 0; i < count; i++) if (g && fabs((double)g[i]) > top) top = fabs((double)g[i]);
    for (int64_t i = 0; i < count && !r->why[0]; i++) {
        const mil_real old = v[i], h = (mil_real)1e-6;
        v[i] = old + h;
        if (p) p->version++;
        const double up = replay_loss(r, tape, loss);
        v[i] = old - h;
        if (p) p->version++;
        const double down = replay_loss(r, tape, loss);
        v[i] = old;
        if (p) p->version++;
        const double slope = (up - down) / (2 * (double)h), err = fabs(slope - (g ? (double)g[i] : 0)) / top;
        if (!(err <= r->err)) {
            r->err = err;
            snprintf(r->worst, sizeof r->worst, "%s", name);
        }
        if (!(err <= 1e-7)) {
            char text[160];
            snprintf(text, sizeof text, "element %lld: gradient %.9g, difference quotient %.9g", (long long)i, g ? (double)g[i] : 0.0, slope);
            replay_fail(r, name, text);
        }
    }
}

// r: opened, nothing recorded; r->training and r->target as wanted. Double only.
static void replay_differences(replay *r)
{
    if (!replay_record(r)) return;
    mil_node *loss = r->out.loss, *dx = NULL;
    mil_tape_backward(r->tape, loss);
    for (int64_t i = 0; i < mil_model_param_count(r->model); i++)
        mil_node_keep(mil_node_grad(mil_use(r->tape, mil_model_param(r->model, i))));
    mil_node_keep(dx = mil_node_grad(r->out.features));
    if (!loss || mil_tape_run(r->tape) != MIL_OK) {
        replay_fail(r, "", loss ? mil_error(r->ctx) : "no loss");
        return;
    }
    replay f = *r;                                         // the forward pass alone, to be run again and again
    f.tape = NULL;
    if (mil_tape_create(r->ctx, &f.tape) != MIL_OK || !replay_record(&f)) {
        replay_fail(r, "", mil_error(r->ctx));
        mil_tape_free(f.tape);
        return;
    }
    mil_node_keep(f.out.loss);
    if (mil_tape_run(f.tape) != MIL_OK) replay_fail(r, "", mil_error(r->ctx));
    for (int64_t i = 0; i <= mil_model_param_count(r->model) && !r->why[0]; i++) {
        mil_param *p = mil_model_param(r->model, i);       // NULL at the end: the features
        if (p && !p->trainable) continue;
        mil_node *g = p ? mil_node_grad(mil_use(r->tape, p)) : dx;
        const int64_t count = p ? p->count : mil_tensor_count(&r->bag.features);
        mil_real *x = g ? (mil_real *)calloc((size_t)count, sizeof *x) : NULL;
        if (g && mil_node_read(g, x, count) != MIL_OK) replay_fail(r, p ? p->key : "features", mil_error(r->ctx));
        replay_slope(r, f.tape, f.out.loss, p, p ? (mil_real *)p->data : r->features, x, count, p ? p->key : "features");
        free(x);
    }
    mil_tape_free(f.tape);
}

static double replay_random(uint64_t *state)                           // about normal(0, 1): a sum of uniforms
{
    double sum = 0;
    for (int i = 0; i < 6; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (double)(*state >> 11) * (1.0 / 9007199254740992.0) - 0.5;
    }
    return sum * 1.4142135623730951;
}

// A model with fresh weights and noise on them, and bags of random features [B, N, D]. labels [B] classes, or NULL: no target.
static int replay_make(replay *r, mil_context *ctx, const char *name, const char *options, int64_t B, int64_t N, const int64_t *labels, uint64_t seed)
{
    memset(r, 0, sizeof *r);
    r->ctx = ctx;
    r->training = 1;
    r->model = mil_create(ctx, name, options);
    if (!r->model || mil_tape_create(ctx, &r->tape) != MIL_OK) {
        replay_fail(r, "", mil_error(ctx));
        return 0;
    }
    for (int64_t i = 0; i < mil_model_param_count(r->model); i++) {
        mil_param *p = mil_model_param(r->model, i);
        for (int64_t k = 0; k < p->count && p->dtype == MIL_REAL_DTYPE; k++) ((mil_real *)p->data)[k] += (mil_real)(0.1 * replay_random(&seed));
        p->version++;
    }
    int64_t shape[3];
    shape[0] = B;
    shape[1] = N;
    shape[2] = mil_model_in_dim(r->model);
    r->features = (mil_real *)calloc((size_t)(B * N * shape[2]) + 1, sizeof *r->features);
    for (int64_t i = 0; i < B * N * shape[2]; i++) r->features[i] = (mil_real)replay_random(&seed);
    r->bag.features = mil_tensor_make(r->features, MIL_REAL_DTYPE, 3, shape);
    for (int64_t i = 0; labels && i < B && i < REPLAY_LABELS; i++) r->labels[i] = labels[i];
    r->has_target = labels != NULL;
    r->target = mil_target_class(r->labels[0]);
    r->target.count = B;
    if (B > 1) r->target.labels = r->labels;
    return 1;
}

#endif
