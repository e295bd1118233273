// build: float double
// Losses: the values of a plain loop and of torch 2.13, gradients by finite differences, and refused targets.
#include "mil.h"
#include "check.h"

#define SMALL (MIL_REAL_IS_FLOAT ? 2e-6 : 1e-12)           // a few roundings of sums of about ten terms

static mil_context *ctx;
static mil_tape *tape;

static void begin(void)
{
    mil_context_options o = mil_context_options_default();
    o.threads = 1;
    CHECK(mil_context_create(&ctx, &o) == MIL_OK);
    CHECK(mil_tape_create(ctx, &tape) == MIL_OK);
    mil_tape_training(tape, 1);
}

static void end(void)
{
    mil_tape_free(tape);
    CHECK(mil_context_bytes(ctx) == 0 || mil_context_threads(ctx) > 1);
    mil_context_free(ctx);
}

// The loss of logits [B, C] (in double) and, with grad not NULL, its gradient [B, C].
static double loss_of(const double *x, int64_t B, int64_t C, const mil_target *target, double *grad)
{
    mil_real values[64], back[64], loss = 0;
    for (int i = 0; i < B * C; i++) values[i] = (mil_real)x[i];
    mil_tape_reset(tape);
    const mil_tensor t = mil_tensor_matrix(values, MIL_REAL_DTYPE, B, C);
    mil_node *logits = mil_input(tape, "logits", &t);
    mil_node_want_grad(logits);
    mil_node *node = mil_loss_node(logits, target);
    mil_node_keep(node);
    CHECK(mil_tape_backward(tape, node) == MIL_OK);
    mil_node_keep(mil_node_grad(logits));
    if (!CHECK(mil_tape_run(tape) == MIL_OK)) { puts(mil_error(ctx)); return (double)NAN; }
    CHECK(mil_node_read(node, &loss, 1) == MIL_OK);
    if (grad) {
        CHECK(mil_node_read(mil_node_grad(logits), back, B * C) == MIL_OK);
        for (int i = 0; i < B * C; i++) grad[i] = (double)back[i];
    }
    return (double)loss;
}

static void refused(int64_t B, int64_t C, const mil_target *target, mil_status status, const char *part)
{
    static const mil_real zeros[64];
    mil_tape_reset(tape);
    const mil_tensor t = mil_tensor_matrix(zeros, MIL_REAL_DTYPE, B, C);
    mil_node *logits = mil_input(tape, "logits", &t);
    CHECK(mil_loss_node(logits, target) == NULL);
    CHECK(mil_tape_status(tape) == status);
    CHECK(mil_tape_run(tape) == status);
    CHECK_CONTAINS(mil_error(ctx), part);
}

static const double logits3[12] = { 0.3, -1.2, 2.1,  0.5, 0.5, -0.7,  -3.0, 1.5, 0.25,  4.0, -2.0, 0.0 };
static const int64_t labels3[4] = { 2, 0, 1, 1 };
static const double weights3[3] = { 0.5, 2.0, 1.25 };

// -log p_c = log sum_k e^(x_k) - x_c
static double plain_ce(const double *x, const int64_t *y, int B, int C, const double *w, double eps)
{
    double sum = 0, scale = 0;
    for (int b = 0; b < B; b++) {
        double z = 0;
        for (int c = 0; c < C; c++) z += exp(x[b * C + c]);
        for (int c = 0; c < C; c++) sum += ((c == y[b] ? 1 - eps : 0) + eps / C) * (w ? w[c] : 1) * (log(z) - x[b * C + c]);
        scale += w ? w[y[b]] : 1;
    }
    return sum / scale;
}

TEST(cross_entropy_of_equal_logits_is_log_of_the_class_count)
{
    begin();
    const double x[5] = { 3, 3, 3, 3, 3 };
    mil_target t = mil_target_class(3);
    double grad[5];
    CHECK_NEAR(loss_of(x, 1, 5, &t, grad), 1.6094379124341003, SMALL);
    CHECK_NEAR(grad[0], 0.2, SMALL);
    CHECK_NEAR(grad[3], -0.8, SMALL);
    end();
}

TEST(cross_entropy_equals_the_plain_loop_and_torch)
{
    static const double torch[4] = { 1.8246686672964452, 1.8584186672964451, 2.297235357967942, 2.268569967153448 };
    begin();
    for (int weighted = 0; weighted < 2; weighted++)
        for (int smooth = 0; smooth < 2; smooth++) {
            mil_target t = mil_target_class(0);
            t.labels = labels3;
            t.count = 4;
            t.class_weights = weighted ? weights3 : NULL;
            t.label_smoothing = smooth ? 0.1 : 0;
            const double loss = loss_of(logits3, 4, 3, &t, NULL);
            CHECK_NEAR(loss, plain_ce(logits3, labels3, 4, 3, t.class_weights, t.label_smoothing), SMALL);
            CHECK_NEAR(loss, torch[2 * weighted + smooth], SMALL);
        }
    end();
}

TEST(cross_entropy_is_stable_for_large_logits)
{
    begin();
    const double x[3] = { 1e4, -1e4, 0 };
    mil_target t = mil_target_class(0);
    double grad[3];
    CHECK(loss_of(x, 1, 3, &t, grad) == 0);
    CHECK(grad[0] == 0 && grad[1] == 0 && grad[2] == 0);
    t.label = 1;
    CHECK_NEAR(loss_of(x, 1, 3, &t, grad), 2e4, SMALL);
    CHECK_NEAR(grad[1], -1, SMALL);
    end();
}

TEST(an_infinite_logit_of_another_class_does_no_harm)
{
    begin();
    const double x[3] = { 1, -(double)INFINITY, 2 };
    mil_target t = mil_target_class(2);
    double grad[3];
    CHECK_NEAR(loss_of(x, 1, 3, &t, grad), 0.31326168751822286, SMALL);
    CHECK(grad[1] == 0);
    CHECK_NEAR(grad[0], 0.2689414213699951, SMALL);
    end();
}

TEST(binary_cross_entropy_equals_torch)
{
    static const double torch[2] = { 0.4655135350990041, 1.067528415029928 };
    static const double targets[12] = { 1, 0, 1, 0, 0.25, 1, 0, 1, 0.75, 1, 0, 0.5 };
    begin();
    for (int weighted = 0; weighted < 2; weighted++) {
        mil_target t = mil_target_value(0);
        t.values = targets;
        t.count = 12;
        t.pos_weight = weighted ? 3.5 : 1;
        CHECK_NEAR(loss_of(logits3, 4, 3, &t, NULL), torch[weighted], SMALL);
    }
    end();
}

TEST(binary_cross_entropy_keeps_small_losses)
{
    begin();
    const double sure[1] = { 30 }, no[1] = { -30 }, huge[1] = { -1e4 };
    mil_target t = mil_target_value(1);
    double grad[1];
    CHECK_NEAR(loss_of(sure, 1, 1, &t, grad) / 9.357622968839737e-14, 1, 1e-5);
    CHECK(loss_of(huge, 1, 1, &t, grad) == 1e4);
    CHECK_NEAR(grad[0], -1, SMALL);
    t.value = 0;
    CHECK_NEAR(loss_of(no, 1, 1, &t, grad) / 9.357622968839737e-14, 1, 1e-5);
    CHECK(loss_of(huge, 1, 1, &t, grad) == 0 && grad[0] == 0);
    end();
}

TEST(gradients_equal_finite_differences)
{
    if (MIL_REAL_IS_FLOAT) return;                         // rounding would hide what is looked for
    static const double targets[12] = { 1, 0, 1, 0, 0.25, 1, 0, 1, 0.75, 1, 0, 0.5 };
    begin();
    for (int kind = 0; kind < 5; kind++) {
        mil_target t = kind < 4 ? mil_target_class(0) : mil_target_value(0);
        t.labels = labels3;
        t.values = targets;
        t.count = kind < 4 ? 4 : 12;
        t.class_weights = kind & 1 ? weights3 : NULL;
        t.label_smoothing = kind & 2 ? 0.1 : 0;
        t.pos_weight = 3.5;
        double grad[12];
        loss_of(logits3, 4, 3, &t, grad);
        for (int i = 0; i < 12; i++) {
            const double h = 1e-5;
            double x[12];
            memcpy(x, logits3, sizeof x);
            x[i] += h;
            const double up = loss_of(x, 4, 3, &t, NULL);
            x[i] -= 2 * h;
            CHECK_NEAR(grad[i], (up - loss_of(x, 4, 3, &t, NULL)) / (2 * h), 1e-9);     // h^2 / 6 times the third derivative
        }
    }
    end();
}

TEST(the_targets_memory_may_go_away_after_recording)
{
    begin();
    mil_real x[12], loss = 0;
    int64_t labels[4];
    double weights[3];
    for (int i = 0; i < 12; i++) x[i] = (mil_real)logits3[i];
    memcpy(labels, labels3, sizeof labels);
    memcpy(weights, weights3, sizeof weights);
    mil_target t = mil_target_class(0);
    t.labels = labels;
    t.count = 4;
    t.class_weights = weights;
    const mil_tensor view = mil_tensor_matrix(x, MIL_REAL_DTYPE, 4, 3);
    mil_node *node = mil_loss_node(mil_input(tape, "logits", &view), &t);
    mil_node_keep(node);
    memset(labels, 0xff, sizeof labels);
    memset(weights, 0xff, sizeof weights);
    memset(&t, 0xff, sizeof t);
    CHECK(mil_tape_run(tape) == MIL_OK);
    CHECK(mil_node_read(node, &loss, 1) == MIL_OK);
    CHECK_NEAR(loss, plain_ce(logits3, labels3, 4, 3, weights3, 0), SMALL);
    end();
}

TEST(targets_that_do_not_fit_are_refused_with_a_sentence)
{
    begin();
    static const int64_t wrong[4] = { 0, 1, 3, 0 };
    static const double nan_weights[3] = { 1, (double)NAN, 1 }, zero_weights[3] = { 0, 1, 1 }, values[2] = { 0.5, (double)NAN };
    mil_target t = mil_target_class(3);
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "label 3 of bag 0 is not one of the classes 0..2");
    t.label = -1;
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "label -1 of bag 0");
    refused(4, 3, &t, MIL_ERROR_ARGUMENT, "1 label for a batch of 4");
    t.labels = wrong;
    t.count = 4;
    refused(4, 3, &t, MIL_ERROR_ARGUMENT, "label 3 of bag 2");
    refused(2, 3, &t, MIL_ERROR_ARGUMENT, "4 labels for a batch of 2");
    memset(&t, 0, sizeof t);
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "mil_target.count is 0, expected 1; use mil_target_class");
    t = mil_target_class(0);
    t.class_weights = nan_weights;
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "the weight of class 1 is");
    t.class_weights = zero_weights;
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "sum to 0");
    t.class_weights = NULL;
    t.label_smoothing = 1.5;
    refused(1, 3, &t, MIL_ERROR_ARGUMENT, "label smoothing 1.5");
    t = mil_target_value(0.5);
    refused(1, 2, &t, MIL_ERROR_ARGUMENT, "1 target value for logits [1, 2]");
    t.value = (double)NAN;
    refused(1, 1, &t, MIL_ERROR_ARGUMENT, "target value 0 is");
    t.value = 1.01;
    refused(1, 1, &t, MIL_ERROR_ARGUMENT, "1.01, not in 0..1");
    t.values = values;
    t.count = 2;
    refused(2, 1, &t, MIL_ERROR_ARGUMENT, "target value 1 is");
    t = mil_target_value(1);
    t.pos_weight = (double)NAN;
    refused(1, 1, &t, MIL_ERROR_ARGUMENT, "pos_weight");
    t.loss = MIL_LOSS_COUNT;
    refused(1, 1, &t, MIL_ERROR_ARGUMENT, "no loss");
    refused(1, 1, NULL, MIL_ERROR_ARGUMENT, "target is NULL");
    end();
}

TEST(binary_targets_are_as_many_as_logits)
{
    static const int64_t counts[3][2] = { { 2, 3 }, { 3, 2 }, { 0, 0 } };
    mil_context *c = NULL;
    mil_tape *t = NULL;
    CHECK(mil_context_create(&c, NULL) == MIL_OK && mil_tape_create(c, &t) == MIL_OK);
    for (int k = 0; k < 3; k++) {
        mil_tape_reset(t);
        CHECK(mil_bce_with_logits(mil_constant(t, 1, &counts[k][0], 1), mil_constant(t, 1, &counts[k][1], 1), 1) == NULL);
        CHECK(mil_tape_status(t) == MIL_ERROR_SHAPE);
        CHECK_CONTAINS(mil_error(c), "binary cross-entropy: targets [");
    }
    mil_tape_free(t);
    mil_context_free(c);
}

TESTS(T(binary_targets_are_as_many_as_logits) T(cross_entropy_of_equal_logits_is_log_of_the_class_count) T(cross_entropy_equals_the_plain_loop_and_torch)
      T(cross_entropy_is_stable_for_large_logits) T(an_infinite_logit_of_another_class_does_no_harm)
      T(binary_cross_entropy_equals_torch) T(binary_cross_entropy_keeps_small_losses) T(gradients_equal_finite_differences)
      T(the_targets_memory_may_go_away_after_recording) T(targets_that_do_not_fit_are_refused_with_a_sentence))
