// `mil check`: replays an experiment that was run on a reference implementation and compares every number.
// A case is a safetensors file: weight.K, in.K, in.rand.K (draws), out.K, grad.K, after.K, and metadata that says how.
#ifndef TOOL_PARITY_H
#define TOOL_PARITY_H
#include "data.h"
#include "unit_bags.h"

typedef struct replay {
    mil_context *ctx;
    const char  *path;
    mil_tensors *file;
    json        *config, *target;
    double       tolerance;                                // 0: the usual ones
    double       worst;                                    // error over tolerance of the worst tensor so far
    char         worst_name[160];
    char         reason[512];                              // why it failed or was skipped
    int          skip, fail;
    int64_t      compared;
} replay;

TOOL_FN MIL_PRINTF(2, 3) void replay_fail(replay *r, const char *format, ...)
{
    va_list list;
    if (r->fail || r->skip) return;                        // the first reason stays
    va_start(list, format);
    vsnprintf(r->reason, sizeof r->reason, format, list);
    va_end(list);
    r->fail = 1;
}

TOOL_FN MIL_PRINTF(2, 3) void replay_skip(replay *r, const char *format, ...)
{
    va_list list;
    if (r->fail || r->skip) return;
    va_start(list, format);
    vsnprintf(r->reason, sizeof r->reason, format, list);
    va_end(list);
    r->skip = 1;
}

// max|x - r| <= relative max|r| + 1e-6, as the cases' page has it; integers are equal. NaN holds only where the reference has
// it, and a masked entry (minus infinity, or the most negative float) where the reference has either.
TOOL_FN void replay_compare(replay *r, const char *name, const mil_tensor *reference, const double *x, int64_t count, double relative)
{
    const int64_t n = mil_tensor_count(reference);
    double largest = 0, err = 0;
    if (count != n) {
        replay_fail(r, "(%s has %lld elements, the reference %lld)", name, (long long)count, (long long)n);
        return;
    }
    if (r->tolerance > 0) relative = r->tolerance;
    for (int64_t i = 0; i < n; i++) {
        const double v = tensor_value(reference, i);
        if (isfinite(v) && fabs(v) < 3e38 && fabs(v) > largest) largest = fabs(v);
    }
    const double limit = dtype_is_integer(reference->dtype) ? 0 : relative * largest + (r->tolerance > 0 ? 1e-3 * relative : 1e-6);
    for (int64_t i = 0; i < n; i++) {
        const double v = tensor_value(reference, i);
        if (isnan(v) && isnan(x[i])) continue;
        if (v < -3e38 && x[i] < -3e38) continue;
        if (v == x[i]) continue;
        const double d = fabs(x[i] - v);
        if (!(d <= err)) err = isnan(d) ? (double)INFINITY : d;
    }
    const double ratio = limit > 0 ? err / limit : err > 0 ? (double)INFINITY : 0;
    r->compared++;
    if (ratio > r->worst || !r->worst_name[0]) {
        r->worst = ratio;
        snprintf(r->worst_name, sizeof r->worst_name, "%s", name);
        snprintf(r->reason, sizeof r->reason, "err=%.2e (%s)", largest > 1e-2 ? err / largest : err, name);
    }
    if (!(ratio <= 1)) r->fail = 1;
}

TOOL_FN void replay_compare_node(replay *r, const char *name, const mil_tensor *reference, mil_node *node, double relative)
{
    double *x = TOOL_NEW(double, node->count);
    if (node->dtype == MIL_I64) {
        int64_t *raw = TOOL_NEW(int64_t, node->count);
        if (mil_node_read(node, (mil_real *)(void *)raw, node->count) != MIL_OK) replay_fail(r, "(%s: %s)", name, mil_error(r->ctx));
        for (int64_t i = 0; i < node->count; i++) x[i] = (double)raw[i];
        free(raw);
    } else {
        mil_real *raw = TOOL_NEW(mil_real, node->count);
        if (mil_node_read(node, raw, node->count) != MIL_OK) replay_fail(r, "(%s: %s)", name, mil_error(r->ctx));
        for (int64_t i = 0; i < node->count; i++) x[i] = (double)raw[i];
        free(raw);
    }
    if (!r->fail || r->worst_name[0]) replay_compare(r, name, reference, x, node->count, relative);
    free(x);
}

TOOL_FN const char *after_prefix(const char *name, const char *prefix)       // what follows "prefix" in name, or NULL
{
    const size_t n = strlen(prefix);
    return strncmp(name, prefix, n) == 0 ? name + n : NULL;
}

// Loads weight.K as a checkpoint with the keys K, through the library's own loader.
TOOL_FN void replay_load(replay *r, mil_model *model)
{
    const int64_t count = mil_tensors_count(r->file);
    mil_tensor *tensors = TOOL_NEW(mil_tensor, count);
    const char **names = TOOL_NEW(const char *, count);
    int64_t n = 0;
    size_t size = 0;
    for (int64_t i = 0; i < count; i++) {
        const char *key = after_prefix(mil_tensors_name(r->file, i), "weight.");
        if (!key) continue;
        names[n] = key;
        tensors[n++] = *mil_tensors_at(r->file, i);
    }
    if (n || mil_model_param_count(model)) {
        char *bytes = NULL;
        if (mil_tensors_write_memory(r->ctx, tensors, names, n, NULL, 0, NULL, &size) == MIL_OK) {
            bytes = TOOL_NEW(char, size);
            if (mil_tensors_write_memory(r->ctx, tensors, names, n, NULL, 0, bytes, &size) == MIL_OK) mil_load_memory(model, bytes, size, NULL);
        }
        if (mil_error_status(r->ctx) != MIL_OK) replay_fail(r, "(weights: %s)", mil_error(r->ctx));
        free(bytes);
    }
    free(tensors);
    free(names);
}

// The bag of in.K. prefix: "in.", or "in.step0." for one of several steps. masks: whether the model takes one.
TOOL_FN mil_bag replay_bag(const replay *r, const char *prefix, int masks, mil_named_tensor *extra)
{
    mil_bag bag;
    memset(&bag, 0, sizeof bag);
    for (int64_t i = 0; i < mil_tensors_count(r->file); i++) {
        const char *key = after_prefix(mil_tensors_name(r->file, i), prefix);
        const mil_tensor *t = mil_tensors_at(r->file, i);
        if (!key || after_prefix(key, "rand.") || after_prefix(key, "cotangent.") || after_prefix(key, "step")) continue;
        if (strcmp(key, "features") == 0) bag.features = *t;
        else if (strcmp(key, "mask") == 0) {               // a reference that has no use for masks ignores them
            if (masks) bag.mask = *t;
        }
        else if (strcmp(key, "coords") == 0) bag.coords = *t;
        else {
            extra[bag.extra_count].name = key;
            extra[bag.extra_count++].tensor = *t;
        }
    }
    bag.extra = extra;
    return bag;
}

// The same tensor in the arithmetic type, packed: what an input that wants a gradient has to be. The memory is the caller's to free.
// What a file gives as a number, as a class: beyond the integers, and NaN, is none.
TOOL_FN int64_t replay_integer(double x) { return x > -9e15 && x < 9e15 ? (int64_t)x : -1; }

TOOL_FN mil_tensor replay_real(const mil_tensor *t, mil_real **memory)
{
    const int64_t n = mil_tensor_count(t);
    *memory = TOOL_NEW(mil_real, n);
    for (int64_t i = 0; i < n; i++) (*memory)[i] = (mil_real)tensor_value(t, i);
    return mil_tensor_make(*memory, MIL_REAL_DTYPE, t->rank, t->shape);
}

TOOL_FN int loss_find(const char *name, mil_loss *loss)
{
#define LOSS(constant, key, text) if (strcmp(name, key) == 0) { *loss = constant; return 1; }
    MIL_LOSS_LIST(LOSS)
#undef LOSS
    return 0;
}

typedef struct replay_labels { int64_t *classes; double *values; } replay_labels;

// The target of metadata `target` and `loss`. "model": the model has a loss of its own and takes what it needs, a class unless it
// is binary by construction.
TOOL_FN int replay_target(replay *r, const mil_model *model, mil_target *target, replay_labels *labels)
{
    const char *loss_name = mil_tensors_meta(r->file, "loss");
    int64_t count = 0;
    const char *config = mil_tensors_meta(r->file, "config");
    mil_loss loss = mil_model_num_classes(model) > 1 || (config && strstr(config, "\"num_classes\"")) ? MIL_LOSS_CE : MIL_LOSS_BCE;
    if (!r->target || r->target->type == '0') return 0;
    if (loss_name && strcmp(loss_name, "model") != 0 && !loss_find(loss_name, &loss)) {
        replay_skip(r, "loss '%s' is not offered", loss_name);
        return 0;
    }
    if (r->target->type == '{') {
        replay_skip(r, "targets of loss '%s' are not offered", loss_name ? loss_name : "");
        return 0;
    }
    const json *item = r->target->type == '[' ? r->target->child : r->target;
    for (const json *j = item; j; j = r->target->type == '[' ? j->next : NULL) count++;
    labels->classes = TOOL_NEW(int64_t, count);
    labels->values = TOOL_NEW(double, count);
    for (int64_t k = 0; k < count; k++, item = item->next) {
        double x = 0;
        if (!item->value || !parse_real(item->value, &x)) { replay_skip(r, "a target that is no number"); return 0; }
        labels->values[k] = x;
        labels->classes[k] = replay_integer(x);
    }
    *target = loss == MIL_LOSS_BCE ? mil_target_value(labels->values[0]) : mil_target_class(labels->classes[0]);
    target->loss = loss;
    target->label = labels->classes[0];
    target->value = labels->values[0];
    target->count = count;
    target->labels = labels->classes;
    target->values = labels->values;
    return 1;
}

TOOL_FN void replay_model(replay *r)
{
    const char *name = mil_tensors_meta(r->file, "model"), *config = mil_tensors_meta(r->file, "config"), *mode = mil_tensors_meta(r->file, "mode");
    const int64_t count = mil_tensors_count(r->file);
    mil_named_tensor *extra = TOOL_NEW(mil_named_tensor, count);
    mil_node **nodes = TOOL_NEW(mil_node *, count);
    replay_labels labels = { NULL, NULL };
    mil_real *features = NULL;
    mil_tape *tape = NULL;
    mil_outputs out;
    mil_target target;
    mil_model *model = mil_create(r->ctx, name, config);
    int grads = 0, cotangents = 0;
    if (!model) {
        const mil_status status = mil_error_status(r->ctx);
        if (status == MIL_ERROR_UNKNOWN || status == MIL_ERROR_UNSUPPORTED) replay_skip(r, "%s", mil_error(r->ctx));
        else replay_fail(r, "(%s)", mil_error(r->ctx));
        goto done;
    }
    for (int64_t i = 0; i < count; i++) {
        grads |= after_prefix(mil_tensors_name(r->file, i), "grad.") != NULL;
        cotangents |= after_prefix(mil_tensors_name(r->file, i), "in.cotangent.") != NULL;
        if (after_prefix(mil_tensors_name(r->file, i), "in.step")) { replay_skip(r, "several steps in one case"); goto done; }
    }
    replay_load(r, model);
    mil_bag bag = replay_bag(r, "in.", mil_model_architecture(model)->flags & MIL_MODEL_MASK, extra);
    if (bag.features.data) bag.features = replay_real(&bag.features, &features);
    const int wanted = replay_target(r, model, &target, &labels);
    if (r->fail || r->skip) goto done;
    if (mil_tape_create(r->ctx, &tape) != MIL_OK) { replay_fail(r, "(%s)", mil_error(r->ctx)); goto done; }
    mil_tape_training(tape, mode && strcmp(mode, "train") == 0);
    if (grads) mil_tape_set(tape, MIL_TAPE_INPUT_GRADS, 1);
    for (int64_t i = 0; i < count; i++) {
        const char *key = after_prefix(mil_tensors_name(r->file, i), "in.rand.");
        if (key) mil_tape_draw(tape, key, mil_tensors_at(r->file, i));
    }
    if (mil_model_record(tape, model, &bag, wanted ? &target : NULL, &out) != MIL_OK) {
        mil_tape_run(tape);                                // which puts the recording's error into the context
        if (mil_tape_status(tape) == MIL_ERROR_UNSUPPORTED) replay_skip(r, "%s", mil_error(r->ctx));
        else replay_fail(r, "(%s)", mil_error(r->ctx));
        goto done;
    }
    for (int64_t i = 0; i < count; i++) {
        const char *key = after_prefix(mil_tensors_name(r->file, i), "out.");
        if (!key) continue;
        nodes[i] = mil_outputs_find(&out, key);
        if (!nodes[i] && strcmp(key, "loss") == 0 && cotangents) continue;
        if (!nodes[i]) { replay_fail(r, "(no output '%s')", key); goto done; }
        mil_node_keep(nodes[i]);
    }
    if (grads && !out.loss) { replay_fail(r, "(gradients without a loss)"); goto done; }
    if (grads) mil_tape_backward(tape, out.loss);
    for (int64_t i = 0; grads && i < count; i++) {
        const char *key = after_prefix(mil_tensors_name(r->file, i), "grad.");
        if (!key) continue;
        if (strcmp(key, "in.features") == 0) {
            nodes[i] = mil_node_grad(out.features);
        } else if (after_prefix(key, "in.")) {
            replay_skip(r, "gradient by the input '%s'", key + 3);
            goto done;
        } else {
            mil_param *p = mil_model_find(model, key);
            if (!p) { replay_fail(r, "(no parameter '%s')", key); goto done; }
            nodes[i] = mil_node_grad(mil_use(tape, p));
        }
        mil_node_keep(nodes[i]);
    }
    if (mil_tape_run(tape) != MIL_OK) {
        if (mil_error_status(r->ctx) == MIL_ERROR_UNSUPPORTED) replay_skip(r, "%s", mil_error(r->ctx));
        else replay_fail(r, "(%s)", mil_error(r->ctx));
        goto done;
    }
    for (int64_t i = 0; i < count; i++) {
        const char *tensor = mil_tensors_name(r->file, i), *key = after_prefix(tensor, "after.");
        if (!nodes[i] && after_prefix(tensor, "grad.")) {      // the loss does not depend on it: a reference may report zeros
            const mil_tensor *t = mil_tensors_at(r->file, i);
            double *zeros = TOOL_NEW(double, mil_tensor_count(t));
            for (int64_t k = 0; k < mil_tensor_count(t); k++) zeros[k] = 0;
            replay_compare(r, tensor, t, zeros, mil_tensor_count(t), 1e-3);
            free(zeros);
        }
        if (nodes[i]) replay_compare_node(r, tensor, mil_tensors_at(r->file, i), nodes[i], after_prefix(tensor, "grad.") ? 1e-3 : 1e-4);
        if (!key) continue;
        mil_param *p = mil_model_find(model, key);
        if (!p) { replay_fail(r, "(no parameter '%s')", key); goto done; }
        double *x = TOOL_NEW(double, p->count);
        for (int64_t k = 0; k < p->count; k++) x[k] = value_at((const char *)p->data + k * (int64_t)mil_dtype_size(p->dtype), p->dtype);
        replay_compare(r, tensor, mil_tensors_at(r->file, i), x, p->count, 1e-4);
        free(x);
    }
    if (!r->compared) replay_fail(r, "(nothing to compare)");
done:
    mil_tape_free(tape);
    mil_model_free(model);
    free(features);
    free(extra);
    free(nodes);
    free(labels.classes);
    free(labels.values);
}

// ---- single layers and functions: `fn.<name>` ----
// A case of its own kind: reads its tensors and config from r, calls replay_compare for each out.K.
typedef struct replay_function { const char *name; void (*run)(replay *r); } replay_function;

TOOL_FN double replay_input(const replay *r, const char *name, int64_t i)
{
    const mil_tensor *t = mil_tensors_get(r->file, name);
    return t && i < mil_tensor_count(t) ? tensor_value(t, i) : (double)NAN;
}

TOOL_FN void replay_out(replay *r, const char *name, const double *x, int64_t count)           // one result, if the case has it
{
    const mil_tensor *t = mil_tensors_get(r->file, name);
    if (t) replay_compare(r, name, t, x, count, 1e-4);
}

TOOL_FN void replay_out_integers(replay *r, const char *name, const int64_t *x, int64_t count)
{
    double *y = TOOL_NEW(double, count);
    for (int64_t i = 0; i < count; i++) y[i] = (double)x[i];
    replay_out(r, name, y, count);
    free(y);
}

#include "parity_fn.h"

// Replays one file: 'o' ok, 'F' failed, 's' skipped; prints its line.
TOOL_FN char replay_file(mil_context *ctx, const char *path, double tolerance, int verbose)
{
    replay r;
    char *stem = path_stem(path), result;
    const char *fault = NULL;
    memset(&r, 0, sizeof r);
    r.ctx = ctx;
    r.path = path;
    r.tolerance = tolerance;
    if (mil_tensors_open(ctx, path, MIL_FILE_READ, &r.file) != MIL_OK) {
        replay_fail(&r, "(%s)", mil_error(ctx));
    } else {
        const char *format = mil_tensors_meta(r.file, "format"), *model = mil_tensors_meta(r.file, "model");
        const char *config = mil_tensors_meta(r.file, "config"), *target = mil_tensors_meta(r.file, "target");
        if (mil_tensors_meta(r.file, "name")) {
            free(stem);
            stem = tool_string(mil_tensors_meta(r.file, "name"));
        }
        r.config = json_parse(config ? config : "{}", config ? strlen(config) : 2, &fault);
        if (!fault && target) r.target = json_parse(target, strlen(target), &fault);
        if (!format || strcmp(format, "mil-case/1") != 0 || !model) replay_fail(&r, "(not a case: no metadata format mil-case/1)");
        else if (fault) replay_fail(&r, "(metadata: %s)", fault);
        else if (after_prefix(model, "fn.")) {
            const replay_function *f = replay_functions;
            while (f->name && strcmp(f->name, model + 3) != 0) f++;
            if (f->name) f->run(&r);
            else replay_skip(&r, "function '%s' is not replayed", model + 3);
        } else {
            replay_model(&r);
        }
    }
    result = r.skip && !r.fail ? 's' : r.fail ? 'F' : 'o';
    if (result == 's') printf("skip %s: %s\n", stem, r.reason);
    else if (result == 'F' || verbose) printf("%s %s %s\n", result == 'o' ? "ok" : "FAIL", stem, r.reason);
    json_free(r.config);
    json_free(r.target);
    mil_tensors_free(r.file);
    free(stem);
    return result;
}
#endif
