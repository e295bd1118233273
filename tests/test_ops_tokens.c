// build: float double
// Depth-wise convolutions, order, neighbours, gathered rows, the smooth SVM loss: against plain loops.
#include "check.h"
#include "gradcheck.h"

static const double tol = sizeof(mil_real) == 8 ? 1e-11 : 2e-5;

static grad_case case_of(mil_node *(*record)(mil_tape *tape, const grad_case *c, mil_node *const *in))
{
    grad_case c;
    memset(&c, 0, sizeof c);
    c.record = record;
    return c;
}

static void add_input(grad_case *c, int rank, int64_t a, int64_t b, int64_t d, int64_t e)
{
    const int64_t shape[4] = { a, b, d, e };
    c->rank[c->count] = rank;
    memcpy(c->shape[c->count++], shape, sizeof shape);
}

// ---- convolutions. i: kind (0 grid, 1 rows, 2 maps), before
static mil_node *record_conv(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    mil_node *bias = c->count > 2 ? in[2] : NULL;
    (void)tape;
    if (c->i[0] == 0) return mil_conv_grid(in[0], in[1], bias);
    return c->i[0] == 1 ? mil_conv_rows(in[0], in[1], bias, c->i[1]) : mil_conv_maps(in[0], in[1], bias, c->i[1]);
}

static void reference_conv(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t *s = c->shape[0], G = c->shape[1][0], kh = c->shape[1][2], kw = c->rank[1] > 3 ? c->shape[1][3] : 1;
    int64_t I = s[0], H = s[1], W = 1, C = s[2], bh = c->i[1], bw = 0;
    if (c->i[0] == 0) { W = s[2]; C = s[3]; bh = kh / 2; bw = kw / 2; }
    if (c->i[0] == 2) { I = s[0] * s[1]; H = s[2]; C = s[3]; }
    CHECK(count == I * H * W * C);
    for (int64_t i = 0; i < I; i++) for (int64_t t = 0; t < H; t++) for (int64_t u = 0; u < W; u++) for (int64_t f = 0; f < C; f++) {
        const int64_t g = c->i[0] == 2 ? i % G : f / (C / G);
        double sum = c->count > 2 ? (double)x[2][g] : 0;
        for (int64_t a = 0; a < kh; a++) for (int64_t b = 0; b < kw; b++) {
            const int64_t h = t + a - bh, w = u + b - bw;
            if (h >= 0 && h < H && w >= 0 && w < W) sum += (double)x[1][(g * kh + a) * kw + b] * (double)x[0][((i * H + h) * W + w) * C + f];
        }
        CHECK_NEAR(y[((i * H + t) * W + u) * C + f], sum, tol);
    }
}

TEST(conv_grid_equals_the_loops)
{
    static const int64_t sizes[][7] = { { 1, 1, 1, 1, 1, 7, 7 }, { 2, 4, 5, 3, 3, 3, 3 }, { 1, 9, 8, 6, 6, 7, 7 }, { 1, 5, 5, 130, 130, 5, 5 },
                                        { 2, 3, 4, 6, 2, 5, 3 }, { 1, 6, 2, 4, 1, 2, 4 }, { 1, 3, 3, 256, 2, 3, 3 } };        // B H W C G kh kw
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        grad_case c = case_of(record_conv);
        add_input(&c, 4, sizes[s][0], sizes[s][1], sizes[s][2], sizes[s][3]);
        add_input(&c, 4, sizes[s][4], 1, sizes[s][5], sizes[s][6]);
        if (s % 3) add_input(&c, 1, sizes[s][4], 0, 0, 0);
        grad_check(&c, reference_conv);
    }
}

// A class token in front of the grid stays out of it.
static mil_node *record_conv_tokens(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_conv_tokens(in[0], in[1], in[2], c->i[0], c->i[1]);
}

static void reference_conv_tokens(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t B = c->shape[0][0], T = c->shape[0][1], C = c->shape[0][2], skip = c->i[0], W = c->i[1], H = (T - skip) / W, k = c->shape[1][2];
    CHECK(count == B * T * C);
    for (int64_t b = 0; b < B; b++) for (int64_t n = 0; n < T; n++) for (int64_t f = 0; f < C; f++) {
        double sum = n < skip ? 0 : (double)x[2][f];
        for (int64_t a = 0; n >= skip && a < k * k; a++) {
            const int64_t h = (n - skip) / W + a / k - k / 2, w = (n - skip) % W + a % k - k / 2;
            if (h >= 0 && h < H && w >= 0 && w < W) sum += (double)x[1][f * k * k + a] * (double)x[0][(b * T + skip + h * W + w) * C + f];
        }
        CHECK_NEAR(y[(b * T + n) * C + f], sum, tol);
    }
}

TEST(conv_tokens_leaves_the_class_token_out)
{
    static const int64_t sizes[][5] = { { 1, 1, 1, 0, 7 }, { 2, 3, 4, 1, 3 }, { 2, 5, 5, 2, 5 } };              // B H W skip k
    for (int s = 0; s < 3; s++) {
        grad_case c = case_of(record_conv_tokens);
        add_input(&c, 3, sizes[s][0], sizes[s][3] + sizes[s][1] * sizes[s][2], 3, 0);
        add_input(&c, 4, 3, 1, sizes[s][4], sizes[s][4]);
        add_input(&c, 1, 3, 0, 0, 0);
        c.i[0] = sizes[s][3];
        c.i[1] = sizes[s][2];
        grad_check(&c, reference_conv_tokens);
    }
}

TEST(conv_rows_equals_the_loops)
{
    static const int64_t sizes[][6] = { { 1, 1, 4, 2, 33, 16 }, { 2, 40, 8, 2, 33, 16 }, { 2, 9, 5, 5, 4, 3 }, { 1, 9, 5, 5, 4, 0 }, { 1, 20, 300, 2, 5, 2 } };  // B N C G k before
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        grad_case c = case_of(record_conv);
        c.i[0] = 1;
        c.i[1] = sizes[s][5];
        add_input(&c, 3, sizes[s][0], sizes[s][1], sizes[s][2], 0);
        add_input(&c, 4, sizes[s][3], 1, sizes[s][4], 1);
        if (s % 2) add_input(&c, 1, sizes[s][3], 0, 0, 0);
        grad_check(&c, reference_conv);
    }
}

TEST(conv_maps_equals_the_loops)
{
    static const int64_t sizes[][5] = { { 1, 2, 3, 4, 15 }, { 3, 2, 17, 17, 15 }, { 2, 4, 5, 140, 3 } };                        // B G N M k
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        grad_case c = case_of(record_conv);
        c.i[0] = 2;
        c.i[1] = sizes[s][4] / 2;
        add_input(&c, 4, sizes[s][0], sizes[s][1], sizes[s][2], sizes[s][3]);
        add_input(&c, 3, sizes[s][1], 1, sizes[s][4], 0);
        add_input(&c, 1, sizes[s][1], 0, 0, 0);
        grad_check(&c, reference_conv);
    }
}

// ---- order
static int64_t *order_of(const mil_real *x, int rank, const int64_t *shape, int axis, int64_t k, int first_largest, int sort, mil_context *ctx)
{
    mil_tape *tape;
    mil_tensor t = mil_tensor_make(x, MIL_REAL_DTYPE, rank, shape);
    int64_t *at = NULL;
    if (!CHECK(mil_tape_create(ctx, &tape) == MIL_OK)) return NULL;
    mil_node *in = mil_input(tape, "x", &t), *y = sort ? mil_argsort(in, axis, first_largest) : mil_topk(in, k, axis, first_largest);
    mil_node_keep(y);
    if (CHECK(mil_tape_run(tape) == MIL_OK)) {
        at = (int64_t *)malloc((size_t)(y->count + 1) * sizeof *at);
        CHECK(mil_node_read(y, at, y->count) == MIL_OK);
    }
    mil_tape_free(tape);
    return at;
}

TEST(topk_and_argsort_order_by_value_then_index)
{
    static const int64_t lengths[] = { 1, 2, 31, 32, 33, 64, 200 };
    mil_context *ctx;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    for (int l = 0; l < 7; l++)
        for (int way = 0; way < 4; way++) {
            const int64_t n = lengths[l], shape[3] = { 2, n, 3 }, k = way & 1 ? n : (n + 1) / 2;
            const int largest = way >> 1, sort = way & 1;
            mil_real x[1200];
            int64_t *at;
            for (int64_t i = 0; i < 6 * n; i++) x[i] = (mil_real)floor(grad_random() * 20);        // many equal
            at = order_of(x, 3, shape, 1, k, largest, sort, ctx);
            for (int64_t o = 0; at && o < 2; o++) for (int64_t j = 0; j < 3; j++) {
                int taken[200] = { 0 };
                for (int64_t i = 0; i < k; i++) {
                    int64_t best = -1;
                    for (int64_t p = 0; p < n; p++) {
                        const mil_real v = x[(o * n + p) * 3 + j];
                        if (taken[p]) continue;
                        if (best < 0 || (largest ? v > x[(o * n + best) * 3 + j] : v < x[(o * n + best) * 3 + j])) best = p;
                    }
                    taken[best] = 1;
                    CHECK(at[(o * k + i) * 3 + j] == best);
                }
            }
            free(at);
        }
    mil_context_free(ctx);
}

TEST(nan_counts_as_the_best)
{
    mil_context *ctx;
    const int64_t shape[1] = { 4 };
    mil_real x[4] = { 1, 0, 3, 2 };
    int64_t *at;
    x[1] = (mil_real)sqrt(-1.0);
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    at = order_of(x, 1, shape, 0, 2, 1, 0, ctx);
    CHECK(at && at[0] == 1 && at[1] == 2);
    free(at);
    mil_context_free(ctx);
}

// ---- neighbours: the indices as numbers, through gather_rows of a table of row numbers
TEST(nearest_finds_the_largest_products)
{
    static const int64_t sizes[][5] = { { 1, 1, 1, 1, 1 }, { 2, 5, 7, 3, 4 }, { 1, 257, 300, 4, 6 }, { 1, 20, 20, 2, 20 }, { 2, 3, 513, 5, 2 } };   // B N M E k
    mil_context *ctx;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    for (int s = 0; s < 5; s++) {
        const int64_t B = sizes[s][0], N = sizes[s][1], M = sizes[s][2], E = sizes[s][3], k = sizes[s][4], sq[3] = { B, N, E }, st[3] = { B, M, E };
        mil_real *q = (mil_real *)malloc((size_t)(B * N * E) * sizeof *q), *t = (mil_real *)malloc((size_t)(B * M * E) * sizeof *t);
        int64_t *at = (int64_t *)malloc((size_t)(B * N * k) * sizeof *at);
        mil_tape *tape;
        mil_tensor tq = mil_tensor_make(q, MIL_REAL_DTYPE, 3, sq), tt = mil_tensor_make(t, MIL_REAL_DTYPE, 3, st);
        for (int64_t i = 0; i < B * N * E; i++) q[i] = (mil_real)floor(grad_random() * 4);         // small integers: exact, with ties
        for (int64_t i = 0; i < B * M * E; i++) t[i] = (mil_real)floor(grad_random() * 4);
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        mil_node *y = mil_nearest(mil_input(tape, "q", &tq), mil_input(tape, "t", &tt), k);
        mil_node_keep(y);
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(y, at, B * N * k) == MIL_OK);
        for (int64_t r = 0; r < B * N; r++) {
            char taken[600] = { 0 };
            for (int64_t i = 0; i < k; i++) {
                int64_t best = -1;
                double top = 0;
                for (int64_t j = 0; j < M; j++) {
                    double v = 0;
                    for (int64_t f = 0; f < E; f++) v += (double)q[r * E + f] * (double)t[(r / N * M + j) * E + f];
                    if (!taken[j] && (best < 0 || v > top)) { best = j; top = v; }
                }
                taken[best] = 1;
                CHECK(at[r * k + i] == best);
            }
        }
        mil_tape_free(tape);
        free(q);
        free(t);
        free(at);
    }
    mil_context_free(ctx);
}

// ---- gather_rows: input 1 holds the indices as reals, so the case can hold them
static mil_node *record_gather_rows(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_gather_rows(in[0], mil_argsort(mil_slice(in[1], 2, 0, c->i[0]), 1, 1));
}

static void reference_gather_rows(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t B = c->shape[0][0], N = c->shape[0][1], E = c->shape[0][2], K = c->shape[1][2], k = c->i[0];
    CHECK(count == B * N * k * E);
    for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < N; i++) for (int64_t j = 0; j < k; j++) {
        int64_t rank = 0;                                  // of row i in column j: there stands x[i]
        for (int64_t p = 0; p < N; p++) rank += x[1][(b * N + p) * K + j] > x[1][(b * N + i) * K + j];
        for (int64_t f = 0; f < E; f++) CHECK(y[((b * N + rank) * k + j) * E + f] == x[0][(b * N + i) * E + f]);
    }
}

TEST(gather_rows_and_its_gradient)
{
    static const int64_t sizes[][4] = { { 1, 1, 1, 1 }, { 2, 7, 3, 2 }, { 1, 130, 5, 3 }, { 3, 4, 2, 6 } };        // B N E k
    for (int s = 0; s < 4; s++) {
        grad_case c = case_of(record_gather_rows);
        add_input(&c, 3, sizes[s][0], sizes[s][1], sizes[s][2], 0);
        add_input(&c, 3, sizes[s][0], sizes[s][1], sizes[s][3], 0);
        c.i[0] = sizes[s][3];
        c.fixed = 2;
        grad_check(&c, reference_gather_rows);
    }
}

// ---- smooth SVM. Input 0: scores [R, C]; labels: the order of input 1's first two columns, modulo C
static mil_node *record_svm(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    const int64_t shape[1] = { c->shape[0][0] };
    (void)tape;
    return mil_smooth_svm(in[0], mil_reshape(mil_argmax(in[1], 1), 1, shape), c->r[0], c->r[1]);
}

static int64_t svm_label(const grad_case *c, mil_real *const *x, int64_t r)
{
    int64_t at = 0;
    for (int64_t j = 1; j < c->shape[1][1]; j++) if (x[1][r * c->shape[1][1] + j] > x[1][r * c->shape[1][1] + at]) at = j;
    return at;
}

static void reference_svm(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t R = c->shape[0][0], C = c->shape[0][1];
    double loss = 0;
    int hard_rows = 0;
    CHECK(count == 1);
    for (int64_t r = 0; r < R; r++) {
        const mil_real *s = x[0] + r * C;
        const int64_t label = svm_label(c, x, r);
        double first = -1e300, second = -1e300, top = -1e300, sum = 0;
        for (int64_t j = 0; j < C; j++) {
            const double v = (double)s[j], a = v + (j != label ? c->r[0] : 0) - (double)s[label];
            if (v > first) { second = first; first = v; } else if (v > second) second = v;
            if (a > top) top = a;
            sum += exp(a / c->r[1]);
        }
        hard_rows += first - second >= c->r[1] * log(1000);
        loss += first - second >= c->r[1] * log(1000) ? top : c->r[1] * log(sum);
    }
    CHECK(R < 9 || C == 1 || (hard_rows > 0 && hard_rows < R));
    CHECK_NEAR(y[0], loss / (double)R, tol);
}

TEST(smooth_svm_has_hard_and_smooth_rows)
{
    for (int s = 0; s < 4; s++) {
        grad_case c = case_of(record_svm);
        add_input(&c, 2, s == 0 ? 1 : 17, 2 + s / 2, 0, 0);
        add_input(&c, 2, s == 0 ? 1 : 17, 2 + s / 2, 0, 0);
        c.fixed = 2;
        c.spread = 8;
        c.r[0] = s == 3 ? 0.5 : 1;
        c.r[1] = s == 3 ? 0.7 : 1;
        grad_check(&c, reference_svm);
    }
}

// No comparison with NaN holds, so that a row could look as if another score were far ahead.
TEST(a_nan_score_makes_the_smooth_svm_nan)
{
    for (int at = 0; at < 3; at++)
        for (int64_t label = 0; label < 3; label++) {
            mil_context *ctx = NULL;
            mil_tape *tape = NULL;
            mil_real scores[6] = { 10, 0, -10, 1, 2, 3 }, loss = 0;
            const int64_t labels[2] = { label, 1 }, two = 2;
            scores[at] = (mil_real)NAN;
            CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
            const mil_tensor ts = mil_tensor_matrix(scores, MIL_REAL_DTYPE, 2, 3), tl = mil_tensor_make(labels, MIL_I64, 1, &two);
            mil_node *y = mil_smooth_svm(mil_input(tape, "scores", &ts), mil_input(tape, "labels", &tl), 1, 1);
            mil_node_keep(y);
            CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(y, &loss, 1) == MIL_OK);
            CHECK(loss != loss);
            mil_tape_free(tape);
            mil_context_free(ctx);
        }
}

static mil_node *record_drop_path(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_drop_path(in[0], c->r[0], "path");
}

static void reference_drop_path(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t slice = count / c->shape[0][0];
    int64_t kept = 0;
    for (int64_t b = 0; b < c->shape[0][0]; b++) {
        const double factor = (double)y[b * slice] / (double)x[0][b * slice];
        kept += factor != 0;
        CHECK(factor == 0 || fabs(factor - 1 / (1 - c->r[0])) < 1e-5);
        for (int64_t j = 0; j < slice; j++) CHECK_NEAR(y[b * slice + j], factor * (double)x[0][b * slice + j], 1e-5);
    }
    CHECK(kept > 20 && kept < 44);                         // of 64, expected 32, deviation 4
}

TEST(drop_path_drops_whole_samples)
{
    grad_case c = case_of(record_drop_path);
    add_input(&c, 3, 64, 3, 2, 0);
    c.training = 1;
    c.r[0] = 0.5;
    grad_check(&c, reference_drop_path);
}

// An index that x does not have: every element of that row is NaN, the rows beside it are as ever.
TEST(a_row_that_is_not_there_is_gathered_as_nan)
{
    static const mil_real data[6] = { 1, 2, 3, 4, 5, 6 };
    static const int64_t index[4] = { 1, 2, -1, 0 }, sx[3] = { 1, 2, 3 }, si[3] = { 1, 2, 2 };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    mil_real y[12];
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    const mil_tensor x = mil_tensor_make(data, MIL_REAL_DTYPE, 3, sx), at = mil_tensor_make(index, MIL_I64, 3, si);
    mil_node *n = mil_gather_rows(mil_input(tape, "x", &x), mil_input(tape, "at", &at));
    mil_node_keep(n);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(n, y, 12) == MIL_OK);
    for (int j = 0; j < 12; j++) {
        const int64_t row = index[j / 3];
        if (row < 0 || row > 1) CHECK(isnan(y[j]));
        else CHECK(y[j] == data[row * 3 + j % 3]);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(smooth_svm_wants_a_class_and_a_row)
{
    static const mil_real data[2] = { 1, 2 };
    static const int64_t label[1] = { 0 };
    static const int64_t shapes[3][2] = { { 1, 0 }, { 0, 2 }, { 2, 1 } };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        const int64_t rows = k == 2 ? 1 : shapes[k][0];    // the last: labels for fewer rows
        mil_tape_reset(tape);
        const mil_tensor x = mil_tensor_make(data, MIL_REAL_DTYPE, 2, shapes[k]), y = mil_tensor_make(label, MIL_I64, 1, &rows);
        CHECK(mil_smooth_svm(mil_input(tape, "x", &x), mil_input(tape, "y", &y), 1, 1) == NULL);
        CHECK(mil_tape_status(tape) == MIL_ERROR_SHAPE);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TEST(dropout_scales_what_it_keeps)
{
    enum { N = 4000 };
    static mil_real y[N], g[N], ones[N];
    const int64_t shape[2] = { N / 4, 4 };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    int kept = 0;
    for (int i = 0; i < N; i++) ones[i] = 1;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    mil_tape_training(tape, 1);
    const mil_tensor t = mil_tensor_make(ones, MIL_REAL_DTYPE, 2, shape);
    mil_node *x = mil_input(tape, "x", &t);
    mil_node_want_grad(x);
    mil_node *d = mil_dropout(x, 0.25, "d");
    CHECK(mil_tape_backward(tape, mil_sum_all(d)) == MIL_OK);
    mil_node_keep(d);
    mil_node_keep(mil_node_grad(x));
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(d, y, N) == MIL_OK && mil_node_read(mil_node_grad(x), g, N) == MIL_OK);
    for (int i = 0; i < N; i++) {
        kept += y[i] != 0;
        CHECK(y[i] == 0 || fabs((double)y[i] - 1 / 0.75) < 1e-6);
        CHECK(g[i] == y[i]);
    }
    CHECK(abs(kept - N * 3 / 4) < 140);                    // five standard deviations
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// A dropped sample is 0, not 0 times what it held.
TEST(drop_path_of_infinity_is_0_or_infinity)
{
    enum { N = 64, C = 3 };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    mil_real x[N * C], y[N * C];
    int dropped = 0;
    for (int i = 0; i < N * C; i++) x[i] = (mil_real)(i % 2 ? HUGE_VAL : -HUGE_VAL);
    x[5] = (mil_real)NAN;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    mil_tape_training(tape, 1);
    const mil_tensor t = mil_tensor_matrix(x, MIL_REAL_DTYPE, N, C);
    mil_node *n = mil_drop_path(mil_input(tape, "x", &t), 0.5, "path");
    mil_node_keep(n);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(n, y, N * C) == MIL_OK);
    for (int i = 0; i < N; i++) {
        dropped += y[i * C] == 0;
        for (int j = 0; j < C; j++) CHECK(y[i * C] == 0 ? y[i * C + j] == 0 : y[i * C + j] == x[i * C + j] || i * C + j == 5);
    }
    CHECK(dropped > 16 && dropped < 48);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TESTS(T(a_row_that_is_not_there_is_gathered_as_nan) T(smooth_svm_wants_a_class_and_a_row) T(dropout_scales_what_it_keeps) T(conv_grid_equals_the_loops) T(conv_tokens_leaves_the_class_token_out)
      T(conv_rows_equals_the_loops) T(conv_maps_equals_the_loops) T(topk_and_argsort_order_by_value_then_index)
      T(nan_counts_as_the_best) T(nearest_finds_the_largest_products) T(gather_rows_and_its_gradient) T(smooth_svm_has_hard_and_smooth_rows)
      T(drop_path_drops_whole_samples) T(a_nan_score_makes_the_smooth_svm_nan) T(drop_path_of_infinity_is_0_or_infinity))
