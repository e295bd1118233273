// build: float double private
// Every op: value against a plain reference, gradient against differences of the reference, on every CPU tier.
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "op_cases.h"

static mil_context *context_of(mil_cpu cpu, int threads)
{
    mil_context *ctx = NULL;
    mil_context_options options = mil_context_options_default();
    options.cpu = cpu;
    options.threads = threads;
    mil_context_create(&ctx, &options);
    return ctx;
}

static const mil_tape_option poison[] = { MIL_TAPE_POISON }, apart[] = { MIL_TAPE_POISON, MIL_TAPE_NO_GROUPS }, unshared[] = { MIL_TAPE_NO_REUSE };

// Ops that stood on a tape of a case, by their place in mil_op_at.
static char seen[1024];

static void watch(mil_tape *tape)
{
    for (int64_t i = 0; i < tape->count; i++)
        for (int64_t k = 0; k < mil_op_count(); k++) seen[k] |= tape->node[i]->op == mil_op_at(k);
}

static void run_all(mil_cpu cpu, int threads, const mil_tape_option *options, int count)
{
    mil_context *ctx = context_of(cpu, threads);
    if (!ctx) return;                                      // a tier that this machine lacks
    op_cases_fill();
    op_case_watch = options == poison && cpu == MIL_CPU_AUTO ? watch : NULL;
    for (int i = 0; i < op_case_count; i++) op_case_check(ctx, &op_cases[i], mil_context_cpu(ctx), options, count);
    CHECK(mil_context_bytes(ctx) == 0 || threads > 1);
    mil_context_free(ctx);
}


TEST(every_case_by_row_groups_with_dead_memory_poisoned) { run_all(MIL_CPU_AUTO, 1, poison, 1); }
// After the test above, which sets `seen`.
TEST(every_op_of_the_list_has_a_case)
{
    // Those with more to say have a file of their own: test_ops_attention.c, test_ops_tokens.c; draws: test_tape.c.
    static const char *const elsewhere[] = { "attention", "attention_keys", "attention_weights", "gradient of attention by q", "gradient of attention by k and v", "run_mean", "gradient of run_mean",
        "identity_minus", "conv", "gradient of conv by its weight", "topk", "argsort", "nearest", "gather_rows", "scatter_rows", "smooth_svm", "gradient of smooth_svm",
        "random", "permutation", "drop", "convert" };
    int any = 0;
    for (int64_t i = 0; i < mil_op_count(); i++) any |= seen[i];
    if (!any) return;                                      // that test was not asked for
    CHECK(mil_op_count() < (int64_t)sizeof seen);
    for (int64_t i = 0; i < mil_op_count(); i++) {
        const mil_op *op = mil_op_at(i);
        int covered = seen[i];
        for (size_t k = 0; k < sizeof elsewhere / sizeof *elsewhere; k++) covered |= strcmp(elsewhere[k], op->name) == 0;
        if (!covered) printf("op %s has no case\n", op->name);
        CHECK(covered);
        CHECK(mil_op_find(op->name) == op);
    }
    CHECK(mil_op_at(-1) == NULL && mil_op_at(mil_op_count()) == NULL && mil_op_find("no such op") == NULL && mil_op_find(NULL) == NULL);
}

TEST(every_case_on_results_of_reductions)
{
    op_case_reduced = 1;
    run_all(MIL_CPU_AUTO, 2, poison, 1);
    op_case_reduced = 0;
}
TEST(every_case_node_by_node) { run_all(MIL_CPU_AUTO, 2, apart, 2); }
TEST(every_case_without_sharing_memory) { run_all(MIL_CPU_AUTO, 1, unshared, 1); }
TEST(every_case_by_plain_kernels) { run_all(MIL_CPU_PLAIN, 1, poison, 1); }
TEST(every_case_by_avx2_kernels) { run_all(MIL_CPU_AVX2, 1, poison, 1); }

// ---- infinities and NaN ----
enum { ROWS = 300, COLS = 3 };

// op over a [rows, cols] matrix; returns the value of `count` elements in `got`
typedef mil_node *one_op(mil_node *x, mil_node *other);
static void run_special(one_op *op, const mil_real *data, const mil_real *other, int64_t rows, int64_t cols, int64_t other_cols, mil_real *got, int64_t count, int apart_too)
{
    mil_context *ctx = context_of(MIL_CPU_AUTO, apart_too ? 1 : 2);
    mil_tape *tape = NULL;
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    if (apart_too) mil_tape_set(tape, MIL_TAPE_NO_GROUPS, 1);
    const mil_tensor t = mil_tensor_matrix(data, MIL_REAL_DTYPE, rows, cols), o = mil_tensor_matrix(other, MIL_REAL_DTYPE, rows, other_cols);
    mil_node *y = op(mil_input(tape, "x", &t), other ? mil_input(tape, "o", &o) : NULL);
    mil_node_keep(y);
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(y, got, count) == MIL_OK);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

static mil_node *softmax_rows(mil_node *x, mil_node *o) { (void)o; return mil_softmax(x, 1); }
static mil_node *softmax_cols(mil_node *x, mil_node *o) { (void)o; return mil_softmax(x, 0); }
static mil_node *logsumexp_rows(mil_node *x, mil_node *o) { (void)o; return mil_logsumexp(x, 1); }
static mil_node *logsumexp_cols(mil_node *x, mil_node *o) { (void)o; return mil_logsumexp(x, 0); }
static mil_node *max_rows(mil_node *x, mil_node *o) { (void)o; return mil_max(x, 1); }
static mil_node *max_cols(mil_node *x, mil_node *o) { (void)o; return mil_max(x, 0); }
static mil_node *min_cols(mil_node *x, mil_node *o) { (void)o; return mil_min(x, 0); }
static mil_node *pool(mil_node *x, mil_node *o) { return mil_softmax_pool(o, x); }
static mil_node *fill(mil_node *x, mil_node *o) { return mil_mask_fill(x, o, -1); }
static mil_node *norm(mil_node *x, mil_node *o) { (void)o; return mil_layer_norm(x, NULL, NULL, 1e-5); }
static mil_node *maximum(mil_node *x, mil_node *o) { return mil_maximum(x, o); }

static mil_real matrix_data[ROWS * COLS], matrix_got[ROWS * COLS], column[ROWS * COLS];

static void matrix_fill(void) { for (int i = 0; i < ROWS * COLS; i++) matrix_data[i] = (mil_real)(i * 37 % 100) / 10 - 5; }

static int is_nan(mil_real x) { return x != x; }

TEST(a_slice_that_is_all_minus_infinity_gives_zeros_or_minus_infinity)
{
    for (int where = 0; where < 2; where++) {
        matrix_fill();
        for (int j = 0; j < COLS; j++) matrix_data[200 * COLS + j] = -(mil_real)HUGE_VAL;
        run_special(softmax_rows, matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS * COLS, where);
        for (int i = 0; i < ROWS; i++) CHECK_NEAR(matrix_got[i * COLS] + matrix_got[i * COLS + 1] + matrix_got[i * COLS + 2], i != 200, 1e-6);
        run_special(logsumexp_rows, matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS, where);
        for (int i = 0; i < ROWS; i++) CHECK((matrix_got[i] == -(mil_real)HUGE_VAL) == (i == 200));
        matrix_fill();
        for (int i = 0; i < ROWS; i++) matrix_data[i * COLS + 1] = -(mil_real)HUGE_VAL;
        run_special(softmax_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS * COLS, where);
        double sum[COLS] = { 0 };
        for (int i = 0; i < ROWS * COLS; i++) sum[i % COLS] += (double)matrix_got[i];
        CHECK_NEAR(sum[0], 1, 1e-5);
        CHECK_NEAR(sum[1], 0, 0);
        CHECK_NEAR(sum[2], 1, 1e-5);
        run_special(logsumexp_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, COLS, where);
        CHECK(matrix_got[1] == -(mil_real)HUGE_VAL && matrix_got[0] > 5 && matrix_got[2] > 5);
        run_special(max_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, COLS, where);
        CHECK(matrix_got[1] == -(mil_real)HUGE_VAL && matrix_got[0] < 5);
    }
}

TEST(plus_infinity_wins_a_log_sum_exp)
{
    for (int where = 0; where < 2; where++) {
        matrix_fill();
        matrix_data[5 * COLS] = matrix_data[250 * COLS] = matrix_data[5 * COLS + 1] = (mil_real)HUGE_VAL;
        run_special(logsumexp_rows, matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS, where);
        for (int i = 0; i < ROWS; i++) CHECK((matrix_got[i] == (mil_real)HUGE_VAL) == (i == 5 || i == 250) && !is_nan(matrix_got[i]));
        run_special(logsumexp_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, COLS, where);
        CHECK(matrix_got[0] == (mil_real)HUGE_VAL && matrix_got[1] == (mil_real)HUGE_VAL && matrix_got[2] < 100);
    }
}

TEST(a_nan_spoils_its_own_slice_only)
{
    static one_op *const along_rows[] = { softmax_rows, norm }, *const one_per_row[] = { logsumexp_rows, max_rows }, *const along_cols[] = { softmax_cols },
                  *const one_per_col[] = { logsumexp_cols, max_cols, min_cols };
    for (int where = 0; where < 2; where++) {
        matrix_fill();
        matrix_data[140 * COLS + 1] = (mil_real)NAN;
        for (int k = 0; k < 2; k++) {
            run_special(along_rows[k], matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS * COLS, where);
            for (int i = 0; i < ROWS * COLS; i++) CHECK(is_nan(matrix_got[i]) == (i / COLS == 140));
            run_special(one_per_row[k], matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS, where);
            for (int i = 0; i < ROWS; i++) CHECK(is_nan(matrix_got[i]) == (i == 140));
        }
        run_special(along_cols[0], matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS * COLS, where);
        for (int i = 0; i < ROWS * COLS; i++) CHECK(is_nan(matrix_got[i]) == (i % COLS == 1));
        for (int k = 0; k < 3; k++) {
            run_special(one_per_col[k], matrix_data, NULL, ROWS, COLS, 0, matrix_got, COLS, where);
            for (int j = 0; j < COLS; j++) CHECK(is_nan(matrix_got[j]) == (j == 1));
        }
        for (int i = 0; i < ROWS * COLS; i++) column[i] = 0;
        run_special(maximum, matrix_data, column, ROWS, COLS, COLS, matrix_got, ROWS * COLS, where);
        for (int i = 0; i < ROWS * COLS; i++) CHECK(is_nan(matrix_got[i]) == (i == 140 * COLS + 1));
        run_special(maximum, column, matrix_data, ROWS, COLS, COLS, matrix_got, ROWS * COLS, where);
        for (int i = 0; i < ROWS * COLS; i++) CHECK(is_nan(matrix_got[i]) == (i == 140 * COLS + 1));
        for (int i = 0; i < ROWS; i++) column[i] = i != 140;           // masked, a NaN is gone
        run_special(fill, matrix_data, column, ROWS, COLS, 1, matrix_got, ROWS * COLS, where);
        for (int i = 0; i < ROWS * COLS; i++) CHECK(matrix_got[i] == (i / COLS == 140 ? -1 : matrix_data[i]));
    }
}

TEST(pooling_skips_masked_rows_whatever_they_hold)
{
    mil_real expected[COLS];
    for (int where = 0; where < 2; where++) {
        matrix_fill();
        for (int i = 0; i < ROWS; i++) column[i] = (mil_real)(i % 13) / 4;
        column[0] = column[150] = column[299] = -(mil_real)HUGE_VAL;
        run_special(pool, matrix_data, column, ROWS, COLS, 1, expected, COLS, where);
        matrix_data[0] = matrix_data[150 * COLS + 2] = (mil_real)NAN;
        matrix_data[299 * COLS + 1] = (mil_real)HUGE_VAL;
        run_special(pool, matrix_data, column, ROWS, COLS, 1, matrix_got, COLS, where);
        CHECK(memcmp(expected, matrix_got, sizeof expected) == 0 && expected[0] == expected[0]);
        column[7] = (mil_real)NAN;                         // a NaN score spoils the result
        run_special(pool, matrix_data, column, ROWS, COLS, 1, matrix_got, COLS, where);
        for (int j = 0; j < COLS; j++) CHECK(is_nan(matrix_got[j]));
        for (int i = 0; i < ROWS; i++) column[i] = -(mil_real)HUGE_VAL;
        run_special(pool, matrix_data, column, ROWS, COLS, 1, matrix_got, COLS, where);
        for (int j = 0; j < COLS; j++) CHECK(matrix_got[j] == 0);
        for (int i = 0; i < ROWS; i++) column[i] = (mil_real)(1000 * (i % 2));       // no overflow
        matrix_fill();
        run_special(pool, matrix_data, column, ROWS, COLS, 1, matrix_got, COLS, where);
        for (int j = 0; j < COLS; j++) {
            double sum = 0;
            for (int i = 1; i < ROWS; i += 2) sum += (double)matrix_data[i * COLS + j];
            CHECK_NEAR(matrix_got[j], sum / (ROWS / 2), 1e-5);
        }
    }
}

// The running maximum is NaN from there on, and no later row may take its place: the bits are asked, since -ffast-math drops
// comparisons with NaN.
TEST(a_nan_score_gives_nan_wherever_it_stands)
{
    static const int places[] = { 0, 1, 150, 298, 299 };
    for (int where = 0; where < 2; where++)
        for (size_t p = 0; p < sizeof places / sizeof *places; p++)
            for (int masked = 0; masked < 2; masked++) {   // the rows beside it -inf, or not
                matrix_fill();
                for (int i = 0; i < ROWS; i++) column[i] = masked && i % 2 ? -(mil_real)HUGE_VAL : (mil_real)(i * 7 % 11);
                for (int i = 0; i < ROWS; i++) matrix_data[i * COLS + 1] = column[i];
                column[places[p]] = matrix_data[places[p] * COLS + 1] = (mil_real)NAN;
                run_special(softmax_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, ROWS * COLS, where);
                for (int i = 0; i < ROWS * COLS; i++) CHECK(mili_is_nan(matrix_got[i]) == (i % COLS == 1));
                run_special(logsumexp_cols, matrix_data, NULL, ROWS, COLS, 0, matrix_got, COLS, where);
                for (int j = 0; j < COLS; j++) CHECK(mili_is_nan(matrix_got[j]) == (j == 1));
                matrix_fill();
                run_special(pool, matrix_data, column, ROWS, COLS, 1, matrix_got, COLS, where);
                for (int j = 0; j < COLS; j++) CHECK(mili_is_nan(matrix_got[j]));
            }
}

TEST(masked_rows_of_a_pool_get_no_gradient_and_all_masked_is_no_nan)
{
    for (int all = 0; all < 2; all++) {
        mil_context *ctx = context_of(MIL_CPU_AUTO, 1);
        mil_tape *tape = NULL;
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        matrix_fill();
        for (int i = 0; i < ROWS; i++) column[i] = all || i % 3 == 0 ? -(mil_real)HUGE_VAL : 1;
        const mil_tensor t = mil_tensor_matrix(matrix_data, MIL_REAL_DTYPE, ROWS, COLS), s = mil_tensor_matrix(column, MIL_REAL_DTYPE, ROWS, 1);
        mil_node *x = mil_input(tape, "x", &t), *scores = mil_input(tape, "s", &s);
        mil_node_want_grad(x);
        mil_node_want_grad(scores);
        mil_tape_backward(tape, mil_sum_all(mil_square(mil_softmax_pool(scores, x))));
        mil_node *gx = mil_node_grad(x), *gs = mil_node_grad(scores);
        mil_node_keep(gx);
        mil_node_keep(gs);
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(gx, matrix_got, ROWS * COLS) == MIL_OK && mil_node_read(gs, column, ROWS) == MIL_OK);
        for (int i = 0; i < ROWS; i++) {
            const int masked = all || i % 3 == 0;
            CHECK(!is_nan(column[i]) && (column[i] == 0) == masked);
            CHECK(!is_nan(matrix_got[i * COLS]) && (matrix_got[i * COLS] == 0) == masked);
        }
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

// The weight of a lone instance is 1, or 0 when it is masked, whatever its score: 0 times -inf must not enter.
TEST(the_score_of_a_lone_instance_has_gradient_0_also_when_it_is_masked)
{
    for (int masked = 0; masked < 2; masked++) {
        mil_context *ctx = context_of(MIL_CPU_AUTO, 1);
        mil_tape *tape = NULL;
        mil_real score[1] = { masked ? -(mil_real)HUGE_VAL : 3 }, value[2] = { 1, 2 }, gs[1] = { 7 }, gv[2] = { 7, 7 };
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        const mil_tensor s = mil_tensor_matrix(score, MIL_REAL_DTYPE, 1, 1), v = mil_tensor_matrix(value, MIL_REAL_DTYPE, 1, 2);
        mil_node *scores = mil_input(tape, "s", &s), *values = mil_input(tape, "v", &v);
        mil_node_want_grad(scores);
        mil_node_want_grad(values);
        mil_tape_backward(tape, mil_sum_all(mil_softmax_pool(scores, values)));
        mil_node_keep(mil_node_grad(scores));
        mil_node_keep(mil_node_grad(values));
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(mil_node_grad(scores), gs, 1) == MIL_OK && mil_node_read(mil_node_grad(values), gv, 2) == MIL_OK);
        CHECK(gs[0] == 0);
        CHECK(gv[0] == !masked && gv[1] == !masked);
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

// A bias of as many elements fits, and its gradient has its own shape.
TEST(weights_of_another_shape_but_as_many_elements_get_their_gradient)
{
    static const mil_real data[12] = { 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 3, 5 }, ones[6] = { 1, 1, 1, 1, 1, 1 };
    for (int k = 0; k < 2; k++) {
        mil_context *ctx = context_of(MIL_CPU_AUTO, 1);
        mil_tape *tape = NULL;
        mil_real gw[6], gb[3], y_got[12], sum[3] = { 0, 0, 0 };
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        const int64_t flat = k ? 2 : 3;
        const mil_tensor t = mil_tensor_matrix(data, MIL_REAL_DTYPE, 4, 3), tw = mil_tensor_matrix(ones, MIL_REAL_DTYPE, k ? 2 : 3, k ? 3 : 1),
                         tb = mil_tensor_matrix(ones, MIL_REAL_DTYPE, flat, 1);
        mil_node *x = mil_input(tape, "x", &t), *w = mil_input(tape, "w", &tw), *b = mil_input(tape, "b", &tb);
        mil_node_want_grad(x);
        mil_node_want_grad(w);
        mil_node_want_grad(b);
        mil_node *y = k ? mil_linear(x, w, b) : mil_layer_norm(x, w, b, 1e-5);
        if (!CHECK(mil_tape_backward(tape, mil_sum_all(mil_mul(y, y))) == MIL_OK)) puts(mil_error(ctx));
        mil_node *dw = mil_node_grad(w), *db = mil_node_grad(b);
        mil_node_keep(y);
        mil_node_keep(dw);
        mil_node_keep(db);
        if (CHECK(mil_tape_run(tape) == MIL_OK && dw && db && dw->shape[0] == tw.shape[0] && dw->shape[1] == tw.shape[1] && db->rank == 2 && db->shape[0] == flat)) {
            CHECK(mil_node_read(y, y_got, 4 * flat) == MIL_OK && mil_node_read(dw, gw, tw.shape[0] * tw.shape[1]) == MIL_OK && mil_node_read(db, gb, flat) == MIL_OK);
            for (int64_t i = 0; i < 4 * flat; i++) sum[i % flat] += 2 * y_got[i];      // db = sum over rows of dy, here 2 y
            for (int64_t j = 0; j < flat; j++) CHECK_NEAR(gb[j], sum[j], 1e-5);
        }
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

TEST(equal_maxima_and_minima_take_the_first_and_its_gradient)
{
    static const mil_real data[8] = { 1, 3, 3, 2, 3, 3, 1, 0 };        // [4, 2]
    for (int way = 0; way < 4; way++) {
        const int axis = way & 1, low = way >> 1;
        mil_context *ctx = context_of(MIL_CPU_AUTO, 1);
        mil_tape *tape = NULL;
        mil_real g[8];
        int64_t at[4];
        CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
        const mil_tensor t = mil_tensor_matrix(data, MIL_REAL_DTYPE, 4, 2);
        mil_node *x = mil_input(tape, "x", &t);
        mil_node_want_grad(x);
        mil_node *arg = mil_argmax(x, axis);
        mil_tape_backward(tape, mil_sum_all(low ? mil_min(mil_affine(x, -1, 0), axis) : mil_max(x, axis)));
        mil_node_keep(arg);
        mil_node_keep(mil_node_grad(x));
        CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(mil_node_grad(x), g, 8) == MIL_OK && mil_node_read(arg, at, axis ? 4 : 2) == MIL_OK);
        static const mil_real by_col[8] = { 0, 1, 1, 0, 0, 0, 0, 0 }, by_row[8] = { 0, 1, 1, 0, 1, 0, 1, 0 };
        for (int i = 0; low && i < 8; i++) g[i] = g[i] == 0 ? 0 : -g[i];           // a minimum of -x
        CHECK(memcmp(g, axis ? by_row : by_col, sizeof g) == 0);
        if (axis) CHECK(at[0] == 1 && at[1] == 0 && at[2] == 0 && at[3] == 0);
        else CHECK(at[0] == 1 && at[1] == 0);
        mil_tape_free(tape);
        mil_context_free(ctx);
    }
}

// As torch: the ends are inside.
TEST(a_clamp_passes_the_gradient_at_its_ends)
{
    static const mil_real data[5] = { -2, -1, 0.5, 3, 4 }, inside[5] = { 0, 1, 1, 1, 0 };
    mil_context *ctx = context_of(MIL_CPU_AUTO, 1);
    mil_tape *tape = NULL;
    mil_real g[5];
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    const mil_tensor t = mil_tensor_matrix(data, MIL_REAL_DTYPE, 1, 5);
    mil_node *x = mil_input(tape, "x", &t);
    mil_node_want_grad(x);
    mil_tape_backward(tape, mil_sum_all(mil_clamp(x, -1, 3)));
    mil_node_keep(mil_node_grad(x));
    CHECK(mil_tape_run(tape) == MIL_OK && mil_node_read(mil_node_grad(x), g, 5) == MIL_OK);
    CHECK(memcmp(g, inside, sizeof g) == 0);
    mil_tape_free(tape);
    mil_context_free(ctx);
}

TESTS(T(a_clamp_passes_the_gradient_at_its_ends) T(every_case_by_row_groups_with_dead_memory_poisoned) T(every_op_of_the_list_has_a_case) T(every_case_on_results_of_reductions)
      T(every_case_node_by_node) T(every_case_without_sharing_memory)
      T(every_case_by_plain_kernels) T(every_case_by_avx2_kernels)
      T(a_slice_that_is_all_minus_infinity_gives_zeros_or_minus_infinity) T(plus_infinity_wins_a_log_sum_exp)
      T(a_nan_spoils_its_own_slice_only) T(pooling_skips_masked_rows_whatever_they_hold)
      T(masked_rows_of_a_pool_get_no_gradient_and_all_masked_is_no_nan) T(equal_maxima_and_minima_take_the_first_and_its_gradient)
      T(a_nan_score_gives_nan_wherever_it_stands) T(the_score_of_a_lone_instance_has_gradient_0_also_when_it_is_masked)
      T(weights_of_another_shape_but_as_many_elements_get_their_gradient))
