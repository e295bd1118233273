// build: float double
// The attention layers in the forms that models outside MIL-Lab use (masks, biases, no output layer, norms per matrix): each against
// its equations written out, and every parameter by finite differences. They are reached as a user's own model would reach them.
#include "mil.h"
#include "check.h"
#include "replay.h"

static const double tol = MIL_REAL_IS_FLOAT ? 2e-4 : 1e-8;

// ---- a model that is one Nystrom layer and a mean over its rows ----
typedef struct { int64_t in_dim, heads, head_dim, landmarks, out_dim, taps, iterations, rows; int per_matrix, qkv_bias; } ny_config;
typedef struct { mil_nystrom_layer layer; } ny_model;

#define NY_ROW(type, member, value) { #member, type, offsetof(ny_config, member), value, type == MIL_OPTION_INT ? "-1..2000" : NULL, "" },
static const mil_option ny_options[] = {
    NY_ROW(MIL_OPTION_INT, in_dim, "4") NY_ROW(MIL_OPTION_INT, heads, "2") NY_ROW(MIL_OPTION_INT, head_dim, "3") NY_ROW(MIL_OPTION_INT, landmarks, "4")
    NY_ROW(MIL_OPTION_INT, out_dim, "0") NY_ROW(MIL_OPTION_INT, taps, "0") NY_ROW(MIL_OPTION_INT, iterations, "6") NY_ROW(MIL_OPTION_INT, rows, "-1")
    NY_ROW(MIL_OPTION_BOOL, per_matrix, "false") NY_ROW(MIL_OPTION_BOOL, qkv_bias, "false")
};
static const mil_config ny_configs[] = { { "base", "" } };

static void ny_declare(mil_builder *b, void *model, const void *config)
{
    const ny_config *c = (const ny_config *)config;
    mil_nystrom_options o = mil_nystrom_options_default(c->in_dim, c->heads, c->head_dim, c->landmarks);
    o.out_dim = c->out_dim;
    o.taps = c->taps;
    o.iterations = c->iterations;
    o.per_matrix = c->per_matrix;
    o.qkv_bias = c->qkv_bias;
    o.qkv = "qkv";
    ((ny_model *)model)->layer = mil_declare_nystrom(b, &o, "attn");
}

// logits: two sums over the result with fixed weights, so that every element counts.
static void ny_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const ny_model *m = (const ny_model *)model;
    const ny_config *c = (const ny_config *)config;
    mil_nystrom_parts parts;
    mil_node *y = mil_nystrom_forward(&m->layer, in->features, in->mask, c->rows, &parts);
    if (!y) return;
    mil_node *z = mil_mean(mil_square(mil_affine(y, 3, 0.5)), 1);                              // [B, 1, W]
    mil_output(out, "y", y);
    if (!in->mask) mil_output(out, "weights", mil_nystrom_weights(&m->layer, &parts, 0));
    out->slide_feats = mil_squeeze(z, 1);
    out->logits = mil_slice(out->slide_feats, 1, 0, 2);
    out->loss = mil_sum_all(mil_tanh(out->slide_feats));
}

static const mil_architecture ny_architecture = { "ny", "a Nystrom layer", "", "", ny_options, (int)(sizeof ny_options / sizeof *ny_options), sizeof(ny_config),
                                                  ny_configs, 1, sizeof(ny_model), "", MIL_MODEL_BATCHES | MIL_MODEL_MASK, ny_declare, ny_forward };

static double *param(mil_model *model, const char *key)
{
    for (int64_t i = 0; i < mil_model_param_count(model); i++) {
        mil_param *p = mil_model_param(model, i);
        if (strcmp(p->key, key) != 0) continue;
        double *v = (double *)malloc((size_t)p->count * sizeof *v);
        for (int64_t k = 0; k < p->count; k++) v[k] = (double)((mil_real *)p->data)[k];
        return v;
    }
    return NULL;
}

// softmax of n scores; those of missing entries are the most negative number, so that all missing gives equal parts
static void softmax(double *s, const double *here, int64_t n)
{
    double top = -1e300, sum = 0;
    for (int64_t j = 0; j < n; j++) { if (here && here[j] == 0) s[j] = -1e300; if (s[j] > top) top = s[j]; }
    for (int64_t j = 0; j < n; j++) sum += s[j] = exp(s[j] - top);
    for (int64_t j = 0; j < n; j++) s[j] /= sum;
}

static void product(double *c, const double *a, const double *b, int64_t n, int64_t k, int64_t m)
{
    for (int64_t i = 0; i < n; i++) for (int64_t j = 0; j < m; j++) {
        c[i * m + j] = 0;
        for (int64_t l = 0; l < k; l++) c[i * m + j] += a[i * k + l] * b[l * m + j];
    }
}

#define ROOM(n) ((double *)calloc((size_t)(n) + 1, sizeof(double)))

// y [B, n, H d] before any output layer, and the weights of row 0, [B, H, n].
static void reference(const ny_config *c, mil_model *model, const mil_real *x, const double *mask, int64_t B, int64_t n, double *y, double *weights)
{
    const int64_t D = c->in_dim, H = c->heads, d = c->head_dim, m = c->landmarks, p = (m - n % m) % m, N = n + p, l = N / m, W = H * d;
    double *w = param(model, "attn.qkv.weight"), *bias = param(model, "attn.qkv.bias"), *conv = param(model, "attn.res_conv.weight");
    double *qkv = ROOM(3 * B * N * W), *mean[2], *A2 = ROOM(B * H * m * m), *Z = ROOM(B * H * m * m), *here = ROOM(B * N), *exist = ROOM(B * m), *norm = ROOM(2 * B * H);
    double *q = qkv, *k = qkv + B * N * W, *v = k + B * N * W, *t1 = ROOM(m * m), *t2 = ROOM(m * m), *s = ROOM(N + m), largest[2] = { 0, 0 };
    for (int i = 0; i < 2; i++) mean[i] = ROOM(B * m * W);
    for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < N; i++) {
        here[b * N + i] = mask ? i >= p && mask[b * n + i - p] != 0 : 1;
        exist[b * m + i / l] += here[b * N + i];
        for (int64_t f = 0; f < 3 * W; f++) {
            double sum = bias ? bias[f] : 0;
            for (int64_t g = 0; g < D && i >= p; g++) sum += w[f * D + g] * (double)x[(b * n + i - p) * D + g];
            if (here[b * N + i] == 0) sum = 0;
            if (f < W) sum /= sqrt((double)d);
            qkv[f / W * B * N * W + (b * N + i) * W + f % W] = sum;
        }
    }
    for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < N; i++) for (int64_t f = 0; f < W; f++) for (int a = 0; a < 2; a++)
        mean[a][(b * m + i / l) * W + f] += (a ? k : q)[(b * N + i) * W + f] / (mask ? exist[b * m + i / l] + 1e-8 : (double)l);
    for (int64_t b = 0; b < B; b++) for (int64_t j = 0; j < m; j++) exist[b * m + j] = exist[b * m + j] > 0;
    for (int64_t o = 0; o < B * H; o++) {
        const int64_t b = o / H, h = o % H;
        double *A = A2 + o * m * m;
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < m; j++) {
                A[i * m + j] = 0;
                for (int64_t f = 0; f < d; f++) A[i * m + j] += mean[0][(b * m + i) * W + h * d + f] * mean[1][(b * m + j) * W + h * d + f];
                if (exist[b * m + i] == 0) A[i * m + j] = 0;
            }
            softmax(A + i * m, exist[b * m + i] != 0 ? exist + b * m : NULL, m);
        }
        for (int64_t i = 0; i < m; i++) {
            double row = 0, column = 0;
            for (int64_t j = 0; j < m; j++) { row += A[i * m + j]; column += A[j * m + i]; }
            if (row > norm[2 * o]) norm[2 * o] = row;
            if (column > norm[2 * o + 1]) norm[2 * o + 1] = column;
        }
        for (int i = 0; i < 2; i++) if (norm[2 * o + i] > largest[i]) largest[i] = norm[2 * o + i];
    }
    for (int64_t o = 0; o < B * H; o++) {
        const int64_t b = o / H, h = o % H;
        const double size = c->per_matrix ? norm[2 * o] * norm[2 * o + 1] : largest[0] * largest[1], *A = A2 + o * m * m;
        double *z = Z + o * m * m, *A3 = ROOM(m * N), *pool = ROOM(m * d), *U = ROOM(m * N), *Y = ROOM(m * d);
        for (int64_t i = 0; i < m; i++) for (int64_t j = 0; j < m; j++) z[i * m + j] = A[j * m + i] / size;
        for (int64_t it = 0; it < c->iterations; it++) {
            static const double factor[3] = { 7, 15, 13 };
            double *az = ROOM(m * m);
            product(az, A, z, m, m, m);
            memcpy(t1, az, (size_t)(m * m) * sizeof *t1);
            for (int r = 0; r < 3; r++) {
                for (int64_t i = 0; i < m * m; i++) t2[i] = (i / m == i % m ? factor[r] : 0) - t1[i];
                product(t1, r < 2 ? az : z, t2, m, m, m);
            }
            for (int64_t i = 0; i < m * m; i++) z[i] = t1[i] / 4;
            free(az);
        }
        for (int64_t i = 0; i < m; i++) {
            for (int64_t j = 0; j < N; j++) {
                A3[i * N + j] = 0;
                for (int64_t f = 0; f < d; f++) A3[i * N + j] += mean[0][(b * m + i) * W + h * d + f] * k[(b * N + j) * W + h * d + f];
                if (exist[b * m + i] == 0) A3[i * N + j] = 0;
            }
            softmax(A3 + i * N, exist[b * m + i] != 0 ? here + b * N : NULL, N);
            for (int64_t f = 0; f < d; f++) for (int64_t j = 0; j < N; j++) pool[i * d + f] += A3[i * N + j] * v[(b * N + j) * W + h * d + f];
        }
        product(Y, z, pool, m, m, d);
        product(U, z, A3, m, m, N);
        for (int64_t i = p; i < N; i++) {
            for (int64_t j = 0; j < m; j++) {
                s[j] = 0;
                for (int64_t f = 0; f < d; f++) s[j] += q[(b * N + i) * W + h * d + f] * mean[1][(b * m + j) * W + h * d + f];
                if (here[b * N + i] == 0) s[j] = 0;
            }
            softmax(s, here[b * N + i] != 0 ? exist + b * m : NULL, m);
            for (int64_t f = 0; f < d; f++) {
                double sum = 0;
                for (int64_t j = 0; j < m; j++) sum += s[j] * Y[j * d + f];
                for (int64_t j = 0; j < c->taps; j++) {
                    const int64_t at = i + j - c->taps / 2;
                    if (at >= 0 && at < N) sum += conv[h * c->taps + j] * v[(b * N + at) * W + h * d + f];
                }
                y[(b * n + i - p) * W + h * d + f] = sum;
            }
            for (int64_t j = p; i == p && j < N; j++) {
                double sum = 0;
                for (int64_t a = 0; a < m; a++) sum += s[a] * U[a * N + j];
                weights[o * n + j - p] = sum;
            }
        }
        free(A3), free(pool), free(U), free(Y);
    }
    free(w), free(bias), free(conv), free(qkv), free(mean[0]), free(mean[1]), free(A2), free(Z), free(here), free(exist), free(norm), free(t1), free(t2), free(s);
}

static int64_t number(const mil_model *model, const char *key) { return strtol(mil_model_option(model, key), NULL, 10); }

static void run_nystrom(const char *options, int64_t B, int64_t n, int masked)
{
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    replay r;
    ny_config c;
    mil_real mask[64];
    double here[64];
    char full[256];
    snprintf(full, sizeof full, "in_dim=4 %s", options);
    (void)replay_open;
    o.threads = 1;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    CHECK(mil_register(ctx, &ny_architecture) == MIL_OK);
    for (int pass = 0; pass <= !MIL_REAL_IS_FLOAT; pass++) {
        const int64_t shape[2] = { B, n };
        if (!CHECK(replay_make(&r, ctx, "ny", full, B, n, NULL, 3))) {
            printf("%s\n", r.why);
            break;
        }
        for (int64_t i = 0; i < B * n && masked; i++) mask[i] = (mil_real)(here[i] = i % 3 != 1 && (i < 5 || i > 9));
        if (masked) r.bag.mask = mil_tensor_make(mask, MIL_REAL_DTYPE, 2, shape);
        if (pass == 1) replay_differences(&r);
        else {
            mil_outputs out;
            memset(&c, 0, sizeof c);
            c.in_dim = number(r.model, "in_dim");
            c.heads = number(r.model, "heads");
            c.head_dim = number(r.model, "head_dim");
            c.landmarks = number(r.model, "landmarks");
            c.out_dim = number(r.model, "out_dim");
            c.taps = number(r.model, "taps");
            c.iterations = number(r.model, "iterations");
            c.rows = number(r.model, "rows");
            c.per_matrix = strcmp(mil_model_option(r.model, "per_matrix"), "true") == 0;
            CHECK(mil_model_record(r.tape, r.model, &r.bag, NULL, &out) == MIL_OK);
            mil_node *y = mil_outputs_find(&out, "y"), *w = mil_outputs_find(&out, "weights");
            mil_node_keep(y);
            mil_node_keep(w);
            if (CHECK(mil_tape_run(r.tape) == MIL_OK) && CHECK(y != NULL)) {
                const int64_t W = c.heads * c.head_dim, rows = c.rows < 0 ? n : c.rows;
                double *ry = ROOM(B * n * W), *rw = ROOM(B * c.heads * n);
                mil_real *got = (mil_real *)malloc((size_t)(B * n * (W + c.heads) + 1) * sizeof *got);
                reference(&c, r.model, r.features, masked ? here : NULL, B, n, ry, rw);
                if (c.out_dim == 0) {
                    CHECK(y->count == B * rows * W && mil_node_read(y, got, y->count) == MIL_OK);
                    for (int64_t i = 0; i < y->count; i++) CHECK_NEAR(got[i], ry[i / (rows * W) * n * W + i % (rows * W)], tol);
                }
                if (w) {
                    CHECK(w->count == B * c.heads * n && mil_node_read(w, got, w->count) == MIL_OK);
                    for (int64_t i = 0; i < w->count; i++) CHECK_NEAR(got[i], rw[i], tol);
                }
                free(ry), free(rw), free(got);
            } else printf("%s\n", mil_error(ctx));
        }
        CHECK_STRING(r.why, "");
        replay_free(&r);
    }
    mil_context_free(ctx);
}

TEST(nystrom_with_padding) { run_nystrom("taps=5", 1, 10, 0); }
TEST(nystrom_without_padding) { run_nystrom("taps=5", 2, 12, 0); }
TEST(nystrom_with_fewer_rows_than_landmarks) { run_nystrom("landmarks=7 taps=3", 2, 3, 0); }
TEST(nystrom_of_some_rows) { run_nystrom("rows=2 taps=3", 1, 11, 0); }
TEST(nystrom_with_qkv_bias) { run_nystrom("qkv_bias=true taps=5", 1, 10, 0); }
TEST(nystrom_with_norms_per_matrix) { run_nystrom("per_matrix=true iterations=3", 2, 9, 0); }
TEST(nystrom_with_output_layer) { run_nystrom("out_dim=5 taps=33", 1, 9, 0); }
TEST(nystrom_with_mask) { run_nystrom("", 2, 10, 1); }
TEST(nystrom_with_mask_and_a_missing_run) { run_nystrom("landmarks=6", 1, 14, 1); }
// Zero rows in front are none where a bias or a mask gives them a query; the wanted rows are then the first all the same.
TEST(nystrom_of_some_rows_with_qkv_bias) { run_nystrom("rows=2 taps=3 qkv_bias=true", 2, 12, 0); }
TEST(nystrom_of_some_rows_with_qkv_bias_and_padding) { run_nystrom("rows=3 taps=5 qkv_bias=true", 1, 11, 0); }
TEST(nystrom_of_some_rows_with_mask) { run_nystrom("rows=2 taps=3", 2, 12, 1); }
TEST(nystrom_of_some_rows_with_mask_and_padding) { run_nystrom("rows=4 taps=3", 1, 14, 1); }
TEST(nystrom_of_some_rows_with_mask_and_output_layer) { run_nystrom("rows=2 out_dim=5 qkv_bias=true", 1, 16, 1); }

// ---- regions ----
TEST(regions_that_do_not_fit_are_refused)
{
    static const mil_real data[16] = { 0 };
    static const struct { int rank; int64_t side, region; } wrong[] = { { 2, 4, 2 }, { 3, 4, 0 }, { 3, 0, 2 }, { 3, -2, 2 }, { 3, 4, 3 }, { 3, 2, 2 }, { 3, 2000000, 2 } };
    static const int64_t shape[3] = { 1, 8, 2 };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
        mil_tape_reset(tape);
        const mil_tensor t = mil_tensor_make(data, MIL_REAL_DTYPE, wrong[k].rank, shape + 3 - wrong[k].rank);
        CHECK(mil_regions_split(mil_input(tape, "x", &t), wrong[k].side, wrong[k].region) == NULL);
        CHECK(mil_tape_status(tape) == MIL_ERROR_SHAPE);
        CHECK_CONTAINS(mil_error(ctx), "regions: ");
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(regions_are_cut_and_put_back)
{
    static const int64_t sizes[][4] = { { 1, 1, 1, 1 }, { 2, 7, 4, 2 }, { 1, 16, 4, 4 }, { 2, 30, 6, 3 } };                 // bags, rows, side, region
    mil_context *ctx;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    for (int s = 0; s < 4; s++) {
        const int64_t B = sizes[s][0], L = sizes[s][1], side = sizes[s][2], region = sizes[s][3], R = side / region, shape[3] = { B, L, 2 };
        mil_real x[256], cut[512], back[256];
        mil_tape *tape;
        mil_tensor t = mil_tensor_make(x, MIL_REAL_DTYPE, 3, shape);
        for (int64_t i = 0; i < B * L * 2; i++) x[i] = (mil_real)(i + 1);
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        mil_node *y = mil_regions_split(mil_input(tape, "x", &t), side, region), *z = mil_regions_join(y, B, side, region, L);
        mil_node_keep(y);
        mil_node_keep(z);
        CHECK(mil_tape_run(tape) == MIL_OK);
        CHECK(y->shape[0] == B * R * R && y->shape[1] == region * region);
        CHECK(mil_node_read(y, cut, y->count) == MIL_OK && mil_node_read(z, back, B * L * 2) == MIL_OK);
        for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < side; i++) for (int64_t j = 0; j < side; j++) for (int f = 0; f < 2; f++) {
            const int64_t token = i * side + j, at = ((b * R * R + i / region * R + j / region) * region * region + i % region * region + j % region) * 2 + f;
            CHECK(cut[at] == (token < L ? x[(b * L + token) * 2 + f] : 0));
        }
        CHECK(memcmp(x, back, (size_t)(B * L * 2) * sizeof *x) == 0);
        mil_tape_free(tape);
    }
    mil_context_free(ctx);
}

// ---- what a declaration cannot be ----
// A model whose declaration is chosen by an option: 0: 4 kernels, 1: none, 2: three, 3: a key as long as may be, 4: one longer, 5: a layer
// norm with such a key, 6: a Nystrom layer whose weights of a row are asked for.
typedef struct { int64_t in_dim, num_classes, which, row; } odd_config;
typedef struct { mil_ppeg_layer ppeg; mil_linear_layer linear; mil_nystrom_layer nystrom; } odd_model;
static const mil_option odd_options[] = {
    { "in_dim", MIL_OPTION_INT, offsetof(odd_config, in_dim), "4", "1..2000", "" },
    { "num_classes", MIL_OPTION_INT, offsetof(odd_config, num_classes), "2", "1..100", "" },
    { "which", MIL_OPTION_INT, offsetof(odd_config, which), "0", "0..100", "" }, { "row", MIL_OPTION_INT, offsetof(odd_config, row), "0", "-100..100", "" }
};

static void odd_declare(mil_builder *b, void *model, const void *config)
{
    static const int64_t kernels[5] = { 7, 5, 3, 3, 3 };
    odd_model *m = (odd_model *)model;
    const odd_config *c = (const odd_config *)config;
    char key[200];
    memset(m, 0, sizeof *m);
    memset(key, 'k', sizeof key);
    key[c->which == 3 ? 127 : 128] = 0;
    m->linear = mil_declare_linear(b, 4, 2, 1, MIL_LINEAR_TORCH, "classifier");
    if (c->which < 3) m->ppeg = mil_declare_ppeg(b, 4, kernels, c->which == 0 ? 4 : c->which == 1 ? 0 : 3, MIL_LINEAR_TORCH, "pos");
    else if (c->which < 5) mil_declare_linear(b, 4, 2, 1, MIL_LINEAR_TORCH, "%s", key);
    else if (c->which == 5) mil_declare_layer_norm(b, 4, 1e-5, "%s", key);
    else {
        const mil_nystrom_options o = mil_nystrom_options_default(4, 1, 4, 4);
        m->nystrom = mil_declare_nystrom(b, &o, "attn");
    }
}

static void odd_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    const odd_model *m = (const odd_model *)model;
    const odd_config *c = (const odd_config *)config;
    mil_nystrom_parts parts;
    mil_node *x = in->features;
    if (c->which == 2) x = mil_ppeg_forward(&m->ppeg, x, 0, 4);
    if (c->which == 6) {
        mil_nystrom_forward(&m->nystrom, x, NULL, -1, &parts);
        mil_output(out, "weights", mil_nystrom_weights(&m->nystrom, &parts, c->row));
    }
    out->slide_feats = mil_squeeze(mil_mean(x, 1), 1);
    out->logits = mil_linear_forward(&m->linear, out->slide_feats);
}

static const mil_architecture odd_architecture = { "odd", "a declaration", "", "", odd_options, 4, sizeof(odd_config), ny_configs, 1, sizeof(odd_model), "classifier",
                                                   MIL_MODEL_BATCHES, odd_declare, odd_forward };

TEST(ppeg_takes_one_to_three_kernels)
{
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_register(ctx, &odd_architecture) == MIL_OK);
    CHECK(!mil_create(ctx, "odd", "in_dim=4 which=0") && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "pos: 4 kernels, 1 to 3 are possible");
    CHECK(!mil_create(ctx, "odd", "in_dim=4 which=1") && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), "pos: 0 kernels");
    mil_model *model = mil_create(ctx, "odd", "in_dim=4 which=2");
    CHECK(model != NULL);
    mil_model_free(model);
    mil_context_free(ctx);
}

// Cut, two long keys would be one.
TEST(a_parameter_key_that_would_be_cut_is_refused)
{
    static const char *const options[2] = { "in_dim=4 which=4", "in_dim=4 which=5" };
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_register(ctx, &odd_architecture) == MIL_OK);
    mil_model *model = mil_create(ctx, "odd", "in_dim=4 which=3");
    CHECK(model && mil_model_param_count(model) == 4 && strlen(mil_model_param(model, 2)->key) == 127 + strlen(".weight"));
    mil_model_free(model);
    for (int k = 0; k < 2; k++) {
        CHECK(!mil_create(ctx, "odd", options[k]) && mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
        CHECK_CONTAINS(mil_error(ctx), "parameter key kkkk");
        CHECK_CONTAINS(mil_error(ctx), "... is too long");
    }
    mil_context_free(ctx);
}

// With one zero row in front, row -1 would be that one.
TEST(nystrom_weights_of_a_row_that_does_not_exist_are_refused)
{
    static const struct { const char *options; int64_t n; mil_status status; } cases[] = {
        { "in_dim=4 which=6 row=-1", 15, MIL_ERROR_SHAPE }, { "in_dim=4 which=6 row=-1", 16, MIL_ERROR_SHAPE },
        { "in_dim=4 which=6 row=15", 15, MIL_ERROR_SHAPE }, { "in_dim=4 which=6 row=14", 15, MIL_OK } };
    static float x[16 * 4];
    mil_context *ctx = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_register(ctx, &odd_architecture) == MIL_OK);
    for (int k = 0; k < 4; k++) {
        mil_model *model = mil_create(ctx, "odd", cases[k].options);
        mil_tape *tape = NULL;
        mil_outputs out;
        const mil_bag bag = mil_bag_make(x, cases[k].n, 4);
        CHECK(model && mil_tape_create(ctx, &tape) == MIL_OK);
        CHECK(mil_model_record(tape, model, &bag, NULL, &out) == cases[k].status);
        if (k < 2) CHECK_CONTAINS(mil_tape_error(tape), "nystrom attention: weights of row -1");
        mil_tape_free(tape);
        mil_model_free(model);
    }
    mil_context_free(ctx);
}

TESTS(T(nystrom_with_padding) T(nystrom_without_padding) T(nystrom_with_fewer_rows_than_landmarks) T(nystrom_of_some_rows) T(nystrom_with_qkv_bias)
      T(nystrom_with_norms_per_matrix) T(nystrom_with_output_layer) T(nystrom_with_mask) T(nystrom_with_mask_and_a_missing_run)
      T(nystrom_of_some_rows_with_qkv_bias) T(nystrom_of_some_rows_with_qkv_bias_and_padding) T(nystrom_of_some_rows_with_mask)
      T(nystrom_of_some_rows_with_mask_and_padding) T(nystrom_of_some_rows_with_mask_and_output_layer) T(regions_that_do_not_fit_are_refused) T(regions_are_cut_and_put_back)
      T(ppeg_takes_one_to_three_kernels) T(a_parameter_key_that_would_be_cut_is_refused) T(nystrom_weights_of_a_row_that_does_not_exist_are_refused))
