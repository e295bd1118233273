// build: float double
// Attention by tiles against the plain formula with its [N, M] matrix.
#include "check.h"
#include "gradcheck.h"

static const double tol = sizeof(mil_real) == 8 ? 1e-11 : 2e-5;

// i: heads; dropout r[0]; input 3: key mask
static mil_node *record_attention(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_attention(in[0], in[1], in[2], c->i[0], c->r[1], c->count > 3 ? in[3] : NULL, c->r[0], "keep");
}

static void reference_attention(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t B = c->shape[0][0], N = c->shape[0][1], H = c->i[0], d = c->shape[0][2] / H, M = c->shape[1][1], e = c->shape[2][2] / H;
    static const double low = -1e300;                      // a variable: with x87 arithmetic the constant has more bits
    double *p = (double *)malloc((size_t)(M + 1) * sizeof *p);
    const double scale = c->r[1] != 0 ? c->r[1] : 1 / sqrt((double)d);
    CHECK(count == B * N * H * e);
    for (int64_t b = 0; b < B; b++) for (int64_t h = 0; h < H; h++) for (int64_t i = 0; i < N; i++) {
        double top = low, sum = 0;
        for (int64_t j = 0; j < M; j++) {
            p[j] = 0;
            for (int64_t l = 0; l < d; l++) p[j] += (double)x[0][(b * N + i) * H * d + h * d + l] * (double)x[1][(b * M + j) * H * d + h * d + l];
            p[j] *= scale;
            if (c->count > 3 && x[3][b * M + j] == 0) p[j] = low;
            else if (p[j] > top) top = p[j];
        }
        for (int64_t j = 0; j < M; j++) sum += p[j] = p[j] == low ? 0 : exp(p[j] - top);
        for (int64_t l = 0; l < e; l++) {
            double o = 0;
            for (int64_t j = 0; j < M; j++) o += p[j] * (double)x[2][(b * M + j) * H * e + h * e + l];
            CHECK_NEAR(y[(b * N + i) * H * e + h * e + l], sum > 0 ? o / sum : 0, tol);
        }
    }
    free(p);
}

static grad_case attention_case(int64_t B, int64_t N, int64_t M, int64_t H, int64_t d, int64_t e)
{
    grad_case c;
    memset(&c, 0, sizeof c);
    c.record = record_attention;
    c.count = 3;
    for (int i = 0; i < 3; i++) {
        c.rank[i] = 3;
        c.shape[i][0] = B;
        c.shape[i][1] = i ? M : N;
        c.shape[i][2] = H * (i == 2 ? e : d);
    }
    c.i[0] = H;
    c.spread = 2;
    return c;
}

TEST(attention_equals_the_formula)
{
    static const int64_t sizes[][6] = { { 1, 1, 1, 1, 1, 1 }, { 2, 5, 7, 2, 3, 4 }, { 1, 127, 3, 1, 5, 2 }, { 1, 128, 9, 2, 4, 4 }, { 2, 129, 33, 1, 8, 16 },
                                        { 1, 3, 512, 2, 4, 4 }, { 1, 3, 513, 2, 4, 4 }, { 1, 130, 600, 1, 3, 5 }, { 2, 40, 768, 2, 8, 8 }, { 3, 50, 2, 3, 2, 1 } };
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        grad_case c = attention_case(sizes[s][0], sizes[s][1], sizes[s][2], sizes[s][3], sizes[s][4], sizes[s][5]);
        c.r[1] = s % 2 ? 0.7 : 0;
        grad_check(&c, reference_attention);
    }
}

static void fill_mask(const grad_case *c, int input, mil_real *x, int64_t count)
{
    if (input != 3) return;
    for (int64_t j = 0; j < count; j++) x[j] = (mil_real)(grad_random() > 0 && (j >= c->shape[1][1] || (c->shape[1][0] == 1 && count > 100)));       // all keys of the first bag are masked
}

TEST(masked_keys_take_no_part)
{
    static const int64_t keys[] = { 1, 37, 530 };
    for (int s = 0; s < 3; s++) {
        grad_case c = attention_case(2, 19, keys[s], 2, 3, 4);
        c.count = 4;
        c.rank[3] = 2;
        c.shape[3][0] = 2;
        c.shape[3][1] = keys[s];
        c.fixed = 8;
        c.fill = fill_mask;
        grad_check(&c, reference_attention);
        c.shape[0][0] = c.shape[1][0] = c.shape[2][0] = c.shape[3][0] = 1;        // one bag: no key at all, or a reduction over them
        grad_check(&c, reference_attention);
    }
}

TEST(dropout_has_the_gradient_of_what_it_did)
{
    static const int64_t keys[] = { 6, 61, 520 };
    for (int s = 0; s < 3; s++) {
        grad_case c = attention_case(2, 21, keys[s], 2, 3, 4);
        c.training = 1;
        c.r[0] = 0.25;
        grad_check(&c, NULL);
        c.shape[0][0] = c.shape[1][0] = c.shape[2][0] = 1;
        grad_check(&c, NULL);
    }
}

TEST(dropout_keeps_the_expected_share_and_replays_a_supplied_draw)
{
    enum { N = 40, M = 600 };
    mil_context *ctx;
    mil_tape *tape;
    mil_real q[N], k[M], v[M], y[N], *keep = (mil_real *)malloc(N * M * sizeof(mil_real));
    double sum = 0;
    for (int way = 0; way < 2; way++) {
        int64_t sq[3] = { 1, N, 1 }, sk[3] = { 1, M, 1 }, sd[4] = { 1, 1, N, M };
        mil_tensor tq, tk, tv, td;
        mil_node *nq, *nk, *nv, *o;
        for (int i = 0; i < N; i++) q[i] = 0;
        for (int j = 0; j < M; j++) { k[j] = 1; v[j] = 1; }
        for (int j = 0; j < N * M; j++) keep[j] = (mil_real)(j % 3 == 0);
        tq = mil_tensor_make(q, MIL_REAL_DTYPE, 3, sq);
        tk = mil_tensor_make(k, MIL_REAL_DTYPE, 3, sk);
        tv = mil_tensor_make(v, MIL_REAL_DTYPE, 3, sk);
        td = mil_tensor_make(keep, MIL_REAL_DTYPE, 4, sd);
        CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
        mil_tape_training(tape, 1);
        if (way) mil_tape_draw(tape, "keep", &td);
        nq = mil_input(tape, "q", &tq);
        nk = mil_input(tape, "k", &tk);
        nv = mil_input(tape, "v", &tv);
        o = mil_attention(nq, nk, nv, 1, 1, NULL, 0.3, "keep");
        mil_node_keep(o);
        CHECK(mil_tape_run(tape) == MIL_OK);
        CHECK(mil_node_read(o, y, N) == MIL_OK);
        if (way) for (int i = 0; i < N; i++) CHECK_NEAR(y[i], 200.0 / 600 / 0.7, 1e-5);
        else {
            for (int i = 0; i < N; i++) sum += (double)y[i] / N;
            CHECK_NEAR(sum, 1, 0.03);                      // 24,000 draws: deviation 0.0042
        }
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
    free(keep);
}

// Probabilities of some rows, averaged over heads; their sum is 1 and they are those of the formula.
static mil_node *record_weights(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_attention_weights(mil_attention(in[0], in[1], in[1], c->i[0], 0, NULL, 0, NULL), c->i[1], c->i[2]);
}

static void reference_weights(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t B = c->shape[0][0], N = c->shape[0][1], H = c->i[0], d = c->shape[0][2] / H, M = c->shape[1][1];
    CHECK(count == B * c->i[2] * M);
    for (int64_t b = 0; b < B; b++) for (int64_t i = 0; i < c->i[2]; i++) for (int64_t j = 0; j < M; j++) {
        double p = 0;
        for (int64_t h = 0; h < H; h++) {
            double sum = 0, own = 0;
            for (int64_t l = 0; l < M; l++) {
                double s = 0;
                for (int64_t f = 0; f < d; f++) s += (double)x[0][(b * N + c->i[1] + i) * H * d + h * d + f] * (double)x[1][(b * M + l) * H * d + h * d + f];
                s = exp(s / sqrt((double)d));
                sum += s;
                if (l == j) own = s;
            }
            p += own / sum / (double)H;
        }
        CHECK_NEAR(y[(b * c->i[2] + i) * M + j], p, tol);
    }
}

TEST(weights_of_chosen_rows_are_the_softmax)
{
    static const int64_t sizes[][4] = { { 10, 12, 0, 1 }, { 10, 12, 3, 5 }, { 3, 530, 0, 3 } };
    for (int s = 0; s < 3; s++) {
        grad_case c = attention_case(2, sizes[s][0], sizes[s][1], 2, 3, 3);
        c.count = 2;
        c.record = record_weights;
        c.fixed = 3;
        c.i[1] = sizes[s][2];
        c.i[2] = sizes[s][3];
        grad_check(&c, reference_weights);
    }
}

static mil_node *record_run_mean(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_run_mean(in[0], c->i[0], c->i[1]);
}

static void reference_run_mean(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t n = c->shape[0][1], C = c->shape[0][2], m = c->i[0], l = (n + c->i[1]) / m;
    CHECK(count == c->shape[0][0] * m * C);
    for (int64_t b = 0; b < c->shape[0][0]; b++) for (int64_t j = 0; j < m; j++) for (int64_t f = 0; f < C; f++) {
        double sum = 0;
        for (int64_t t = j * l; t < (j + 1) * l; t++) if (t >= c->i[1]) sum += (double)x[0][(b * n + t - c->i[1]) * C + f];
        CHECK_NEAR(y[(b * m + j) * C + f], sum / (double)l, tol);
    }
}

TEST(run_means_count_the_zeros_in_front)
{
    static const int64_t sizes[][3] = { { 1, 1, 0 }, { 12, 4, 0 }, { 10, 4, 2 }, { 3, 8, 5 }, { 129, 10, 1 } };      // n, m, before
    for (int s = 0; s < 5; s++) {
        grad_case c = attention_case(2, sizes[s][0], 1, 1, 3, 1);
        c.count = 1;
        c.record = record_run_mean;
        c.i[0] = sizes[s][1];
        c.i[1] = sizes[s][2];
        grad_check(&c, reference_run_mean);
    }
}

// So many columns that the runs' sums are not kept per thread: rows come in waves of some thousand, each spread over the runs in it.
TEST(run_means_of_many_columns_are_taken_wave_by_wave)
{
    enum { N = 9001, C = 130, M = 137, BEFORE = 41, RUN = (N + BEFORE) / M };
    const int64_t shape[3] = { 1, N, C };
    float *x = (float *)malloc((size_t)N * C * sizeof *x);
    mil_real *y = (mil_real *)malloc((size_t)M * C * sizeof *y);
    if (!CHECK(x && y)) return;
    for (int64_t i = 0; i < (int64_t)N * C; i++) x[i] = (float)grad_random();
    for (int threads = 1; threads < 4; threads++) {
        mil_context *ctx = NULL;
        mil_tape *tape = NULL;
        mil_context_options o = mil_context_options_default();
        o.threads = threads;
        CHECK(mil_context_create(&ctx, &o) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
        const mil_tensor t = mil_tensor_make(x, MIL_F32, 3, shape);
        mil_node *mean = mil_run_mean(mil_affine(mil_input(tape, "x", &t), 2, 1), M, BEFORE);
        mil_node_keep(mean);
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(mean, y, M * C) == MIL_OK);
        for (int64_t run = 0; run < M; run++)
            for (int64_t c = 0; c < C; c++) {
                double sum = 0;
                for (int64_t i = run * RUN - BEFORE; i < (run + 1) * RUN - BEFORE; i++) if (i >= 0) sum += 2 * (double)x[i * C + c] + 1;
                CHECK_NEAR(y[run * C + c], sum / RUN, 1e-5);
            }
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
    free(x);
    free(y);
}

static mil_node *record_identity_minus(mil_tape *tape, const grad_case *c, mil_node *const *in)
{
    (void)tape;
    return mil_identity_minus(in[0], c->r[0]);
}

static void reference_identity_minus(const grad_case *c, mil_real *const *x, const mil_real *y, int64_t count)
{
    const int64_t n = c->shape[0][1];
    for (int64_t j = 0; j < count; j++) CHECK_NEAR(y[j], (j % n == j / n % n ? c->r[0] : 0) - (double)x[0][j], tol);
}

TEST(identity_minus_acts_on_each_matrix)
{
    grad_case c = attention_case(3, 5, 1, 1, 5, 1);
    c.count = 1;
    c.record = record_identity_minus;
    c.r[0] = 13;
    grad_check(&c, reference_identity_minus);
}

TEST(attention_refuses_what_does_not_fit)
{
    mil_context *ctx;
    mil_tape *tape = NULL;
    int64_t a[3] = { 1, 4, 6 }, b[3] = { 1, 4, 5 };
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    CHECK(mil_attention(mil_constant(tape, 3, a, 1), mil_constant(tape, 3, b, 1), mil_constant(tape, 3, a, 1), 2, 0, NULL, 0, NULL) == NULL);
    CHECK(mil_tape_status(tape) == MIL_ERROR_SHAPE);
    mil_tape_reset(tape);
    CHECK(mil_attention(mil_constant(tape, 3, a, 1), mil_constant(tape, 3, a, 1), mil_constant(tape, 3, a, 1), 4, 0, NULL, 0, NULL) == NULL);
    mil_tape_reset(tape);
    CHECK(mil_attention(mil_constant(tape, 3, a, 1), mil_constant(tape, 3, a, 1), mil_constant(tape, 3, a, 1), 2, 0, NULL, 1, NULL) == NULL);
    CHECK(mil_tape_status(tape) == MIL_ERROR_ARGUMENT);
    mil_tape_reset(tape);
    CHECK(mil_attention_weights(mil_constant(tape, 3, a, 1), 0, 1) == NULL);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// One bag with more than 512 keys reads the keys by rows, with an op of its own; a backend finds it by its name all the same.
TEST(each_way_of_attention_is_found_by_its_name)
{
    static const int64_t keys[] = { 5, 600 };
    mil_context *ctx = NULL;
    mil_tape *tape = NULL;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK && mil_tape_create(ctx, &tape) == MIL_OK);
    for (int k = 0; k < 2; k++) {
        const int64_t q[3] = { 1, 1, 4 }, kv[3] = { 1, keys[k], 4 };
        const mil_node *n = mil_attention(mil_constant(tape, 3, q, 1), mil_constant(tape, 3, kv, 1), mil_constant(tape, 3, kv, 1), 1, 0, NULL, 0, NULL);
        int listed = 0;
        if (!CHECK(n != NULL)) break;
        for (int64_t i = 0; i < mil_op_count(); i++) listed += mil_op_at(i) == n->op;
        CHECK(listed == 1 && mil_op_find(n->op->name) == n->op);
    }
    mil_tape_free(tape);
    mil_context_free(ctx);
}

// Weights and gradients need the softmax's denominators, which are kept with the attention.
TEST(a_kept_attention_gives_weights_and_gradients_after_the_run)
{
    enum { D = 4, MOST = 520 };
    static mil_real x[MOST * D], g[2][MOST * D], w[2][3 * MOST];
    mil_context *ctx = NULL;
    for (int i = 0; i < MOST * D; i++) x[i] = (mil_real)(i * 7 % 10) / 5;
    CHECK(mil_context_create(&ctx, NULL) == MIL_OK);
    for (int way = 0; way < 4; way++) {                    // queries by rows; and keys by rows
        const int64_t N = way < 2 ? 10 : MOST, shape[3] = { 1, N, D };
        const mil_tensor t = mil_tensor_make(x, MIL_REAL_DTYPE, 3, shape);
        mil_tape *tape = NULL;
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        mil_node *in = mil_input(tape, "x", &t);
        mil_node_want_grad(in);
        mil_node *y = mil_attention(in, in, in, 2, 0, NULL, 0, NULL), *loss = mil_sum_all(y);
        mil_node_keep(y);
        if (way % 2) CHECK(mil_tape_run(tape) == MIL_OK);
        mil_node *weights = mil_attention_weights(y, 0, 3);
        CHECK(mil_tape_backward(tape, loss) == MIL_OK);
        mil_node_keep(weights);
        mil_node_keep(mil_node_grad(in));
        if (!CHECK(mil_tape_run(tape) == MIL_OK)) puts(mil_error(ctx));
        else CHECK(mil_node_read(weights, w[way % 2], 3 * N) == MIL_OK && mil_node_read(mil_node_grad(in), g[way % 2], N * D) == MIL_OK);
        mil_tape_free(tape);
        for (int64_t i = 0; i < 3 * N && way % 2; i++) CHECK_NEAR(w[1][i], w[0][i], 1e-6);
        for (int64_t i = 0; i < N * D && way % 2; i++) CHECK_NEAR(g[1][i], g[0][i], 1e-5);
    }
    mil_context_free(ctx);
}

TESTS(T(attention_equals_the_formula) T(masked_keys_take_no_part) T(dropout_has_the_gradient_of_what_it_did)
      T(dropout_keeps_the_expected_share_and_replays_a_supplied_draw) T(weights_of_chosen_rows_are_the_softmax)
      T(run_means_count_the_zeros_in_front) T(run_means_of_many_columns_are_taken_wave_by_wave) T(identity_minus_acts_on_each_matrix) T(attention_refuses_what_does_not_fit)
      T(each_way_of_attention_is_found_by_its_name) T(a_kept_attention_gives_weights_and_gradients_after_the_run))
