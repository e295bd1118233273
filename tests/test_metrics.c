// build: float
// Metrics against values worked out independently: small cases by hand, and scikit-learn 1.9.1 on the data below (the
// C-index by its n^2 definition, the temperature by scipy's bounded minimiser).
#include "mil.h"
#include "check.h"

#include <stdint.h>
#include <stdlib.h>

#define COUNT(a) ((int64_t)(sizeof(a) / sizeof *(a)))
#define EXACT 1e-14                                        // the same few operations in double, perhaps in another order

static const int64_t y2[] = {                              // binary, scores with many ties
    0, 0, 0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 1
};
static const double s2[] = {
    0.50, 0.40, 0.05, 0.50, 0.60, 0.40, 0.30, 0.30, 0.20, 0.20, 0.90, 0.40, 0.60, 0.60, 0.30, 0.40, 0.40, 0.40,
    0.20, 0.40, 0.90, 0.30, 0.60, 0.60
};
static const int64_t y4[] = {                              // four classes, class 2 absent
    3, 3, 3, 1, 3, 3, 0, 0, 3, 1, 3, 1, 0, 0, 1, 3, 1, 1, 3, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 0
};
static const double p4[] = {
    0.04, 0.07, 0.10, 0.79, 0.35, 0.03, 0.05, 0.57, 0.01, 0.06, 0.08, 0.85, 0.37, 0.36, 0.13, 0.14, 0.47, 0.07,
    0.07, 0.39, 0.19, 0.17, 0.07, 0.57, 0.22, 0.42, 0.24, 0.12, 0.54, 0.07, 0.29, 0.10, 0.44, 0.07, 0.36, 0.13,
    0.04, 0.53, 0.11, 0.32, 0.69, 0.03, 0.04, 0.24, 0.24, 0.34, 0.12, 0.30, 0.67, 0.05, 0.13, 0.15, 0.18, 0.24,
    0.08, 0.50, 0.22, 0.52, 0.10, 0.16, 0.06, 0.15, 0.64, 0.15, 0.43, 0.09, 0.40, 0.08, 0.24, 0.35, 0.02, 0.39,
    0.52, 0.11, 0.09, 0.28, 0.06, 0.46, 0.09, 0.39, 0.08, 0.26, 0.05, 0.61, 0.15, 0.45, 0.17, 0.23, 0.18, 0.40,
    0.25, 0.17, 0.05, 0.02, 0.03, 0.90, 0.07, 0.14, 0.20, 0.59, 0.11, 0.40, 0.26, 0.23, 0.38, 0.18, 0.20, 0.24,
    0.40, 0.15, 0.22, 0.23, 0.04, 0.45, 0.07, 0.44, 0.46, 0.11, 0.10, 0.33
};
static const int64_t y3[] = {                              // three classes, logits
    0, 0, 1, 0, 0, 0, 2, 0, 2, 0, 2, 1, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 1, 0, 1, 2, 2, 1, 1, 2
};
static const double z3[] = {
    1.0, 4.5, -3.7, 5.0, 1.5, 2.6, 5.6, 6.9, -3.4, -2.7, 2.5, -3.0, 2.4, 2.5, -4.9, -3.9, 0.8, 0.1, -0.7, 0.1, -0.2,
    -2.1, -0.5, -2.9, -4.9, 1.5, 2.2, 3.6, -3.0, -2.0, -3.0, -2.7, 3.0, -2.3, 3.5, 1.0, 8.5, -4.2, 2.7, 2.1, -0.0,
    -4.3, 1.0, 2.2, -0.2, 0.2, 1.5, 3.5, 2.3, -6.6, -2.1, -3.5, -9.8, -1.6, 6.4, 0.1, -3.5, -2.8, 3.4, 2.9, 2.5,
    -0.2, 0.1, 4.8, 1.7, 0.6, -3.1, 3.9, -2.1, 5.7, -3.8, -0.4, -0.0, -1.6, 5.2, 4.4, -1.4, 4.7, 1.1, -7.8, 3.2,
    -0.2, 2.6, -3.2, -0.8, 1.9, 3.6, 1.0, -0.0, 7.0
};
static const double risk20[] = {
    -0.6, -0.4, -1.8, 1.6, 1.0, 0.9, 0.7, 0.1, 0.2, -0.3, -0.2, 0.1, 1.5, 0.6, -0.1, -0.6, -0.6, 1.6, 0.5, 0.1
};
static const double time20[] = {
    3, 11, 8, 1, 10, 2, 1, 7, 7, 3, 2, 24, 1, 2, 16, 3, 2, 4, 3, 5
};
static const int64_t event20[] = {
    1, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1
};

// ---- contexts ----

// The `left`-th allocation from now fails, once or from then on; -1: none does.
typedef struct { long left; int once; size_t live; } failing;

static void *failing_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    failing *f = (failing *)user;
    if (new_size == 0) {
        if (block) f->live -= old_size;
        free(block);
        return NULL;
    }
    const int fails = f->left == 0;
    void *p = fails ? NULL : realloc(block, new_size);
    if (f->left > 0 || (fails && f->once)) f->left--;      // once: below 0 nothing fails any more
    if (p) f->live += new_size - (block ? old_size : 0);
    return p;
}

static mil_context *make_context(failing *f)               // f NULL: the library's own allocator
{
    mil_context *c = NULL;
    mil_context_options options = mil_context_options_default();
    options.threads = 1;
    if (f) options.allocator.reallocate = failing_reallocate;
    options.allocator.user = f;
    CHECK(mil_context_create(&c, &options) == MIL_OK);
    return c;
}

static mil_context *ctx;                                   // of the test that is running

static void open_context(void)
{
    mil_context_free(ctx);
    ctx = make_context(NULL);
}

static int is_nan(double x) { return x != x; }

// Probabilities [n, 2] from those of class 1.
static void two_columns(const double *s, int64_t n, double *p)
{
    for (int64_t i = 0; i < n; i++) {
        p[2 * i] = 1 - s[i];
        p[2 * i + 1] = s[i];
    }
}

static void softmax_rows(const double *z, int64_t n, int64_t C, double scale, double *p)
{
    for (int64_t i = 0; i < n; i++) {
        double sum = 0;
        for (int64_t c = 0; c < C; c++) sum += exp(scale * z[i * C + c]);
        for (int64_t c = 0; c < C; c++) p[i * C + c] = exp(scale * z[i * C + c]) / sum;
    }
}

// A small generator of the test's own.
static double noise(uint64_t *state)
{
    *state = *state * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
    return (double)(*state >> 33) / 2147483648.0;
}

// ---- confusion matrix ----

TEST(predict_takes_the_lower_class_on_ties)
{
    const double scores[] = { 1, 3, 3,  2, 2, 1,  -5, -4, -3 }, one[] = { 0.5, 0.51, 0 };
    int64_t predicted[3];
    open_context();
    CHECK(mil_metric_predict(ctx, scores, 3, 3, predicted) == MIL_OK);
    CHECK(predicted[0] == 1 && predicted[1] == 0 && predicted[2] == 2);
    CHECK(mil_metric_predict(ctx, one, 3, 1, predicted) == MIL_OK);
    CHECK(predicted[0] == 0 && predicted[1] == 1 && predicted[2] == 0);
}

TEST(confusion_has_truth_in_rows)
{
    const int64_t labels[] = { 0, 0, 1, 2, 2, 2 }, predicted[] = { 0, 1, 1, 0, 2, 2 };
    const int64_t expected[] = { 1, 1, 0,  0, 1, 0,  1, 0, 2 };
    int64_t confusion[9];
    open_context();
    CHECK(mil_metric_confusion(ctx, predicted, labels, 6, 3, confusion) == MIL_OK);
    for (int i = 0; i < 9; i++) CHECK(confusion[i] == expected[i]);
}

// M = [1 1 0; 0 1 0; 1 0 2]: recall 1/2, 1, 2/3; precision 1/2, 1/2, 1; F1 1/2, 2/3, 4/5; specificity 3/4, 4/5, 1.
TEST(per_class_values_by_hand)
{
    const int64_t m[] = { 1, 1, 0,  0, 1, 0,  1, 0, 2 };
    double v, per[3];
    open_context();
    CHECK(mil_metric_accuracy(ctx, m, 3, &v) == MIL_OK);
    CHECK_NEAR(v, 4.0 / 6, EXACT);
    CHECK(mil_metric_balanced_accuracy(ctx, m, 3, &v) == MIL_OK);
    CHECK_NEAR(v, (0.5 + 1 + 2.0 / 3) / 3, EXACT);
    CHECK(mil_metric_recall(ctx, m, 3, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(v, (0.5 + 1 + 2.0 / 3) / 3, EXACT);
    CHECK_NEAR(per[2], 2.0 / 3, EXACT);
    CHECK(mil_metric_precision(ctx, m, 3, MIL_AVERAGE_WEIGHTED, per, &v) == MIL_OK);
    CHECK_NEAR(v, (2 * 0.5 + 1 * 0.5 + 3 * 1) / 6, EXACT);
    CHECK_NEAR(per[1], 0.5, EXACT);
    CHECK(mil_metric_f1(ctx, m, 3, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(v, (0.5 + 2.0 / 3 + 0.8) / 3, EXACT);
    CHECK(mil_metric_f1(ctx, m, 3, MIL_AVERAGE_WEIGHTED, NULL, &v) == MIL_OK);
    CHECK_NEAR(v, (2 * 0.5 + 2.0 / 3 + 3 * 0.8) / 6, EXACT);
    CHECK(mil_metric_specificity(ctx, m, 3, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(v, (0.75 + 0.8 + 1) / 3, EXACT);
}

TEST(class_neither_seen_nor_predicted_is_left_out_of_means)
{
    const int64_t m[] = { 2, 0, 0,  0, 0, 0,  2, 0, 4 };   // class 1 does not occur
    double v, per[3];
    open_context();
    CHECK(mil_metric_recall(ctx, m, 3, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(v, (1 + 4.0 / 6) / 2, EXACT);
    CHECK(is_nan(per[1]));
    CHECK(mil_metric_f1(ctx, m, 3, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(v, (4.0 / 6 + 8.0 / 10) / 2, EXACT);
}

TEST(class_predicted_but_not_seen_counts_zero_in_recall_and_not_in_balanced_accuracy)
{
    const int64_t m[] = { 3, 1,  0, 0 };
    double v;
    open_context();
    CHECK(mil_metric_recall(ctx, m, 2, MIL_AVERAGE_MACRO, NULL, &v) == MIL_OK);
    CHECK_NEAR(v, 0.375, EXACT);
    CHECK(mil_metric_balanced_accuracy(ctx, m, 2, &v) == MIL_OK);
    CHECK_NEAR(v, 0.75, EXACT);
}

// [20 5; 10 15]: p_o .7, p_e (25*30 + 25*20)/2500 = .5, kappa .4. For two classes all weightings agree.
TEST(kappa_by_hand)
{
    const int64_t m[] = { 20, 5,  10, 15 };
    const mil_kappa_weights all[] = { MIL_KAPPA_UNWEIGHTED, MIL_KAPPA_LINEAR, MIL_KAPPA_QUADRATIC };
    double v;
    open_context();
    for (int i = 0; i < 3; i++) {
        CHECK(mil_metric_kappa(ctx, m, 2, all[i], &v) == MIL_OK);
        CHECK_NEAR(v, 0.4, EXACT);
    }
}

TEST(kappa_of_a_single_class_is_undefined)
{
    const int64_t m[] = { 7, 0,  0, 0 };
    double v = 0;
    open_context();
    CHECK(mil_metric_kappa(ctx, m, 2, MIL_KAPPA_UNWEIGHTED, &v) == MIL_OK);
    CHECK(is_nan(v));
}

// Formulas over whole rows and columns, one class after the other: what many classes are summed by must not show.
TEST(many_classes_give_what_plain_formulas_give)
{
    enum { MOST = 150 };
    static int64_t m[MOST * MOST];
    static double row[MOST], column[MOST], per[MOST];
    static const int64_t sizes[] = { 64, 65, 128, 129, MOST };
    static const mil_kappa_weights all[] = { MIL_KAPPA_UNWEIGHTED, MIL_KAPPA_LINEAR, MIL_KAPPA_QUADRATIC };
    uint64_t state = 11;
    open_context();
    for (int k = 0; k < COUNT(sizes); k++) {
        const int64_t classes = sizes[k];
        double n = 0, right = 0, f1[2] = { 0, 0 }, specificity[2] = { 0, 0 }, weight[2] = { 0, 0 }, v;
        for (int64_t i = 0; i < classes; i++) row[i] = column[i] = 0;
        for (int64_t i = 0; i < classes; i++)
            for (int64_t j = 0; j < classes; j++) {
                const double x = noise(&state);
                int64_t *cell = &m[i * classes + j];
                *cell = i == j ? (int64_t)(40 * x) : x < 0.1 ? (int64_t)(90 * x) : 0;
                if (i == 7 || j == 7 || i == 9) *cell = 0; // class 7 does not occur, class 9 is predicted only
                row[i] += (double)*cell;
                column[j] += (double)*cell;
                n += (double)*cell;
                right += i == j ? (double)*cell : 0;
            }
        for (int64_t c = 0; c < classes; c++) {
            const double tp = (double)m[c * classes + c], fp = column[c] - tp, fn = row[c] - tp, tn = n - tp - fp - fn;
            const double weights[2] = { tp + fp + fn > 0 ? 1.0 : 0.0, row[c] };
            for (int w = 0; w < 2 && c != 7; w++) {
                f1[w] += weights[w] * 2 * tp / (2 * tp + fp + fn);
                specificity[w] += weights[w] * tn / (tn + fp);
                weight[w] += weights[w];
            }
        }
        CHECK(mil_metric_accuracy(ctx, m, classes, &v) == MIL_OK);
        CHECK_NEAR(v, right / n, 1e-13);
        for (int w = 0; w < 2; w++) {
            const mil_average average = w ? MIL_AVERAGE_WEIGHTED : MIL_AVERAGE_MACRO;
            CHECK(mil_metric_f1(ctx, m, classes, average, per, &v) == MIL_OK);
            CHECK_NEAR(v, f1[w] / weight[w], 1e-12);
            CHECK(is_nan(per[7]) && per[9] == 0);
            CHECK(mil_metric_specificity(ctx, m, classes, average, per, &v) == MIL_OK);
            CHECK_NEAR(v, specificity[w] / weight[w], 1e-12);
            CHECK(is_nan(per[7]));
            CHECK_NEAR(per[9], (n - column[9]) / n, 1e-13);
        }
        for (int w = 0; w < 3; w++) {
            double seen = 0, chance = 0;
            for (int64_t i = 0; i < classes; i++)
                for (int64_t j = 0; j < classes; j++) {
                    const double d = fabs((double)(i - j)), cost = w == 0 ? (i != j ? 1.0 : 0.0) : w == 1 ? d : d * d;
                    seen += cost * (double)m[i * classes + j];
                    chance += cost * row[i] * column[j];
                }
            CHECK(mil_metric_kappa(ctx, m, classes, all[w], &v) == MIL_OK);
            CHECK_NEAR(v, 1 - seen * n / chance, 1e-12);
        }
    }
}

// ---- ranking ----

// Positives .35 .8, negatives .1 .4: the pairs .35 > .1, .8 > .1, .8 > .4 are right, .35 < .4 is not: 3/4.
// AP: after .8 P 1, after .35 (rank 3) P 2/3: (1 + 2/3)/2.
TEST(auroc_and_average_precision_by_hand)
{
    const double s[] = { 0.1, 0.4, 0.35, 0.8 };
    const int64_t y[] = { 0, 0, 1, 1 };
    double v;
    open_context();
    CHECK(mil_metric_auroc(ctx, s, y, 4, &v) == MIL_OK);
    CHECK_NEAR(v, 0.75, EXACT);
    CHECK(mil_metric_average_precision(ctx, s, y, 4, &v) == MIL_OK);
    CHECK_NEAR(v, (1 + 2.0 / 3) / 2, EXACT);
}

TEST(auroc_of_equal_scores_is_one_half)
{
    const double s[] = { 3, 3, 3, 3, 3 };
    const int64_t y[] = { 0, 1, 0, 1, 1 };
    double v;
    open_context();
    CHECK(mil_metric_auroc(ctx, s, y, 5, &v) == MIL_OK);
    CHECK_NEAR(v, 0.5, 0);
    CHECK(mil_metric_average_precision(ctx, s, y, 5, &v) == MIL_OK);
    CHECK_NEAR(v, 0.6, EXACT);
}

TEST(auroc_takes_infinite_scores)
{
    const double s[] = { -HUGE_VAL, HUGE_VAL, 0, HUGE_VAL };
    const int64_t y[] = { 0, 1, 0, 0 };
    double v;
    open_context();
    CHECK(mil_metric_auroc(ctx, s, y, 4, &v) == MIL_OK);
    CHECK_NEAR(v, 2.5 / 3, EXACT);
}

TEST(auroc_of_one_class_is_undefined)
{
    const double s[] = { 1, 2 };
    const int64_t ones[] = { 1, 1 }, zeros[] = { 0, 0 };
    double v = 0;
    open_context();
    CHECK(mil_metric_auroc(ctx, s, ones, 2, &v) == MIL_OK && is_nan(v));
    v = 0;
    CHECK(mil_metric_auroc(ctx, s, zeros, 2, &v) == MIL_OK && is_nan(v));
    v = 0;
    CHECK(mil_metric_average_precision(ctx, s, zeros, 2, &v) == MIL_OK && is_nan(v));
    CHECK(mil_metric_average_precision(ctx, s, ones, 2, &v) == MIL_OK);
    CHECK_NEAR(v, 1, 0);
}

// AUROC is the share of ordered pairs, whatever the size of the merge-sorted array; the sort must not lose anything.
TEST(auroc_equals_the_count_of_pairs)
{
    const int64_t sizes[] = { 2, 3, 4, 5, 7, 8, 9, 31, 64, 100, 257 };
    uint64_t state = 5;
    open_context();
    for (int64_t k = 0; k < COUNT(sizes); k++) {
        const int64_t n = sizes[k];
        double s[257], v, right = 0, pairs = 0;
        int64_t y[257];
        for (int64_t i = 0; i < n; i++) {
            s[i] = floor(20 * noise(&state));
            y[i] = i < 2 ? i : noise(&state) < 0.4;
        }
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < n; j++)
                if (y[i] == 1 && y[j] == 0) {
                    pairs += 1;
                    right += s[i] > s[j] ? 1 : s[i] == s[j] ? 0.5 : 0;
                }
        CHECK(mil_metric_auroc(ctx, s, y, n, &v) == MIL_OK);
        CHECK_NEAR(v, right / pairs, EXACT);
    }
}

TEST(one_vs_rest_names_absent_classes_and_leaves_them_out)
{
    double v, per[4];
    open_context();
    CHECK(mil_metric_auroc_ovr(ctx, p4, y4, 30, 4, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(per[0], 0.76, EXACT);
    CHECK_NEAR(per[1], 0.753968253968254, EXACT);
    CHECK(is_nan(per[2]));
    CHECK_NEAR(per[3], 0.6584821428571429, EXACT);
    CHECK_NEAR(v, 0.7241501322751324, EXACT);
    CHECK(mil_metric_auroc_ovr(ctx, p4, y4, 30, 4, MIL_AVERAGE_WEIGHTED, NULL, &v) == MIL_OK);
    CHECK_NEAR(v, 0.7040476190476191, EXACT);
    CHECK(mil_metric_average_precision_ovr(ctx, p4, y4, 30, 4, MIL_AVERAGE_MACRO, per, &v) == MIL_OK);
    CHECK_NEAR(per[0], 0.4359649122807017, EXACT);
    CHECK_NEAR(per[1], 0.591249799583133, EXACT);
    CHECK(is_nan(per[2]));
    CHECK_NEAR(per[3], 0.7128678902116402, EXACT);
    CHECK_NEAR(v, 0.5800275340251583, EXACT);
}

TEST(youden_threshold_by_hand_and_from_roc_curve)
{
    const double s[] = { 0.1, 0.4, 0.35, 0.8 }, up[] = { 1, 2 };
    const int64_t y[] = { 0, 0, 1, 1 }, wrong[] = { 1, 0 }, one[] = { 1, 1 };
    double threshold, j;
    open_context();
    CHECK(mil_metric_youden(ctx, s, y, 4, &threshold, &j) == MIL_OK);      // J = .5 at .8 and at .35: the higher one
    CHECK_NEAR(threshold, 0.8, 0);
    CHECK_NEAR(j, 0.5, EXACT);
    CHECK(mil_metric_youden(ctx, s2, y2, 24, &threshold, NULL) == MIL_OK);
    CHECK_NEAR(threshold, 0.5, 0);
    CHECK(mil_metric_youden(ctx, s2, y2, 24, &threshold, &j) == MIL_OK);
    CHECK_NEAR(j, 0.4666666666666666, EXACT);
    CHECK(mil_metric_youden(ctx, up, wrong, 2, &threshold, &j) == MIL_OK); // no threshold is better than calling none
    CHECK(threshold == HUGE_VAL && j == 0);
    CHECK(mil_metric_youden(ctx, up, one, 2, &threshold, &j) == MIL_OK && is_nan(threshold) && is_nan(j));
}

// ---- calibration ----

// p(1) = .9 right, .6 wrong, .2 right. Brier (.01 + .36 + .04)/3. Log loss -(ln .9 + ln .4 + ln .8)/3.
// ECE in 2 bins: all top probabilities .9 .6 .8 in (.5, 1]: |2/3 - 2.3/3| = .1. In 10: (.1 + .6 + .2)/3.
TEST(calibration_by_hand)
{
    const double s[] = { 0.9, 0.6, 0.2 };
    const int64_t y[] = { 1, 0, 0 };
    double p[6], v;
    open_context();
    two_columns(s, 3, p);
    for (int64_t C = 1; C <= 2; C++) {
        const double *q = C == 1 ? s : p;
        CHECK(mil_metric_brier(ctx, q, y, 3, C, &v) == MIL_OK);
        CHECK_NEAR(v, 0.41 / 3, EXACT);
        CHECK(mil_metric_log_loss(ctx, q, y, 3, C, &v) == MIL_OK);
        CHECK_NEAR(v, -(log(0.9) + log(0.4) + log(0.8)) / 3, EXACT);
        CHECK(mil_metric_ece(ctx, q, y, 3, C, 2, &v) == MIL_OK);
        CHECK_NEAR(v, 0.1, EXACT);
        CHECK(mil_metric_ece(ctx, q, y, 3, C, 10, &v) == MIL_OK);
        CHECK_NEAR(v, 0.3, EXACT);
    }
}

TEST(log_loss_of_an_impossible_truth_is_finite)
{
    const double p[] = { 1, 0 };
    const int64_t y[] = { 1 };
    double v;
    open_context();
    CHECK(mil_metric_log_loss(ctx, p, y, 1, 2, &v) == MIL_OK);
    CHECK_NEAR(v, 36.04365338911715, EXACT);               // -log(2^-52)
    CHECK(mil_metric_brier(ctx, p, y, 1, 2, &v) == MIL_OK);
    CHECK_NEAR(v, 1, 0);
}

TEST(temperature_matches_a_reference_minimiser)
{
    double T, nll, z[30];
    int64_t y[30];
    open_context();
    CHECK(mil_temperature_fit(ctx, z3, y3, 30, 3, &T, &nll) == MIL_OK);
    CHECK_NEAR(T, 2.9539611125981278, 1e-6);               // the reference's minimum is flat to sqrt(2^-52)
    CHECK_NEAR(nll, 0.7935608429897524, 1e-13);
    for (int i = 0; i < 30; i++) {
        z[i] = z3[3 * i + 1] - z3[3 * i];
        y[i] = y3[i] == 1;
    }
    CHECK(mil_temperature_fit(ctx, z, y, 30, 1, &T, &nll) == MIL_OK);
    CHECK_NEAR(T, 5.388125889153354, 1e-6);
    CHECK_NEAR(nll, 0.5985411866952307, 1e-13);
}

TEST(temperature_scales_with_the_logits_and_leaves_log_loss_at_its_minimum)
{
    double T, again, nll, z[90], p[90], at, near;
    open_context();
    CHECK(mil_temperature_fit(ctx, z3, y3, 30, 3, &T, &nll) == MIL_OK);
    for (int i = 0; i < 90; i++) z[i] = 7 * z3[i];
    CHECK(mil_temperature_fit(ctx, z, y3, 30, 3, &again, NULL) == MIL_OK);
    CHECK_NEAR(again, 7 * T, 1e-10);
    softmax_rows(z3, 30, 3, 1 / T, p);
    CHECK(mil_metric_log_loss(ctx, p, y3, 30, 3, &at) == MIL_OK);
    CHECK_NEAR(at, nll, 1e-13);
    for (int side = -1; side <= 1; side += 2) {
        softmax_rows(z3, 30, 3, 1 / (T * (1 + 0.01 * side)), p);
        CHECK(mil_metric_log_loss(ctx, p, y3, 30, 3, &near) == MIL_OK);
        CHECK(near > at);
    }
}

TEST(temperature_without_an_optimum_is_an_end_of_its_range)
{
    const double right[] = { 1, 0,  0, 1 }, huge[] = { 1e300, 0, 0, 1e300 }, flat[] = { 2, 2,  5, 5 };
    const int64_t y[] = { 0, 1 }, wrong[] = { 1, 0 };
    double T;
    open_context();
    CHECK(mil_temperature_fit(ctx, right, y, 2, 2, &T, NULL) == MIL_OK);
    CHECK_NEAR(T, 0.01, EXACT);
    CHECK(mil_temperature_fit(ctx, right, wrong, 2, 2, &T, NULL) == MIL_OK);
    CHECK_NEAR(T, 100, EXACT);
    CHECK(mil_temperature_fit(ctx, flat, y, 2, 2, &T, NULL) == MIL_OK);
    CHECK_NEAR(T, 1, 0);
    CHECK(mil_temperature_fit(ctx, huge, y, 2, 2, &T, NULL) == MIL_OK);
    CHECK_NEAR(T, 1, 0);
}

// Beyond some 745 the other class's probability is lost in a double, and with it the slope at T = 1.
TEST(temperature_of_saturated_right_logits_is_the_lowest)
{
    const double sizes[] = { 10, 90, 700, 745, 810, 2000, 7000 };
    const int64_t y[] = { 0, 1 };
    open_context();
    for (int64_t k = 0; k < COUNT(sizes); k++) {
        const double z = sizes[k], two[] = { z, 0,  0, z }, one[] = { -z, z };
        double T = 0, nll = 1;
        CHECK(mil_temperature_fit(ctx, two, y, 2, 2, &T, &nll) == MIL_OK);
        CHECK_NEAR(T, 0.01, EXACT);
        CHECK(nll >= 0 && nll < 1e-15);
        CHECK(mil_temperature_fit(ctx, one, y, 2, 1, &T, &nll) == MIL_OK);
        CHECK_NEAR(T, 0.01, EXACT);
    }
}

// Their differences overflow: an error, or an answer that is a number of the range.
TEST(temperature_of_logits_near_the_largest_double_is_no_nonsense)
{
    const double z[] = { 1e308, -1e308 };
    const int64_t labels[] = { 0, 1 };
    open_context();
    for (int k = 0; k < 2; k++) {
        double T = 7, nll = 7;
        const mil_status status = mil_temperature_fit(ctx, z, labels + k, 1, 2, &T, &nll);
        if (status == MIL_OK) CHECK(T >= 0.01 && T <= 100 && nll >= 0 && nll <= 1.7e308);
        else {
            CHECK(status == MIL_ERROR_NUMERIC);
            CHECK_CONTAINS(mil_error(ctx), "temperature: ");
            CHECK(T == 7 && nll == 7);
        }
    }
}

// ---- survival ----

// times 1+ 2 3+ 4 with + an event; risks 4 3 3 1. Pairs: (1,2) 3<4, (1,3), (1,4) concordant; (3,4) 1<3 concordant: 4/4.
// With risks 1 3 1 1: (1,2) discordant, (1,3) and (1,4) tied, (3,4) tied: 1.5/4.
TEST(cindex_by_hand)
{
    const double t[] = { 1, 2, 3, 4 }, a[] = { 4, 3, 3, 1 }, b[] = { 1, 3, 1, 1 };
    const int64_t e[] = { 1, 0, 1, 0 };
    mil_cindex c;
    open_context();
    CHECK(mil_metric_cindex(ctx, a, t, e, 4, 1e-8, &c) == MIL_OK);
    CHECK(c.concordant == 4 && c.discordant == 0 && c.tied_risk == 0);
    CHECK_NEAR(c.value, 1, 0);
    CHECK(mil_metric_cindex(ctx, b, t, e, 4, 1e-8, &c) == MIL_OK);
    CHECK(c.concordant == 0 && c.discordant == 1 && c.tied_risk == 3);
    CHECK_NEAR(c.value, 0.375, EXACT);
}

TEST(cindex_with_ties_matches_its_definition)
{
    mil_cindex c;
    open_context();
    CHECK(mil_metric_cindex(ctx, risk20, time20, event20, 20, 1e-8, &c) == MIL_OK);
    CHECK(c.concordant == 63 && c.discordant == 55 && c.tied_risk == 5 && c.tied_time == 8);
    CHECK_NEAR(c.value, 0.532520325203252, EXACT);
}

TEST(cindex_equals_the_count_of_pairs_for_any_tolerance)
{
    const double tolerances[] = { 0, 1e-8, 0.3, 5 };
    uint64_t state = 11;
    open_context();
    for (int64_t n = 1; n <= 65; n += 8)
        for (int k = 0; k < 4; k++) {
            double risk[65], times[65];
            int64_t events[65], concordant = 0, discordant = 0, tied = 0, tied_time = 0;
            mil_cindex c;
            for (int64_t i = 0; i < n; i++) {
                risk[i] = floor(10 * noise(&state)) / 4;
                times[i] = floor(12 * noise(&state));
                events[i] = noise(&state) < 0.6;
            }
            for (int64_t i = 0; i < n; i++)
                for (int64_t j = 0; j < n; j++)
                    if (events[i] && (times[j] > times[i] || (times[j] == times[i] && !events[j]))) {
                        const double d = risk[j] - risk[i];
                        tied_time += times[j] == times[i];
                        *(fabs(d) <= tolerances[k] ? &tied : d < 0 ? &concordant : &discordant) += 1;
                    }
            CHECK(mil_metric_cindex(ctx, risk, times, events, n, tolerances[k], &c) == MIL_OK);
            CHECK(c.concordant == concordant && c.discordant == discordant);
            CHECK(c.tied_risk == tied && c.tied_time == tied_time);
        }
}

TEST(cindex_without_a_pair_is_undefined)
{
    const double t[] = { 1, 2 }, r[] = { 1, 2 };
    const int64_t e[] = { 0, 0 };
    mil_cindex c;
    open_context();
    CHECK(mil_metric_cindex(ctx, r, t, e, 2, 1e-8, &c) == MIL_OK && is_nan(c.value));
}

// ---- everything at once ----

TEST(all_binary_metrics_match_scikit_learn)
{
    double p[48];
    mil_metrics m;
    open_context();
    two_columns(s2, 24, p);
    for (int64_t C = 1; C <= 2; C++) {
        CHECK(mil_metrics_compute(ctx, C == 1 ? s2 : p, y2, 24, C, &m) == MIL_OK);
        CHECK(m.count == 24 && m.class_count == 2 && m.absent_count == 0);
        CHECK_NEAR(m.accuracy, 0.75, EXACT);
        CHECK_NEAR(m.balanced_accuracy, 0.7111111111111111, EXACT);
        CHECK_NEAR(m.auroc, 0.7666666666666666, EXACT);
        CHECK_NEAR(m.auroc_weighted, 0.7666666666666666, EXACT);
        CHECK_NEAR(m.average_precision, 0.6830026455026454, EXACT);
        CHECK_NEAR(m.f1_macro, 0.71875, EXACT);
        CHECK_NEAR(m.f1_weighted, 0.7421875, EXACT);
        CHECK_NEAR(m.precision_macro, 0.7394957983193278, EXACT);
        CHECK_NEAR(m.recall_macro, 0.7111111111111111, EXACT);
        CHECK_NEAR(m.specificity_macro, 0.7111111111111111, EXACT);
        CHECK_NEAR(m.f1, 0.625, EXACT);
        CHECK_NEAR(m.precision, 0.7142857142857143, EXACT);
        CHECK_NEAR(m.sensitivity, 0.5555555555555556, EXACT);
        CHECK_NEAR(m.specificity, 0.8666666666666667, EXACT);
        CHECK_NEAR(m.kappa, 0.4418604651162791, EXACT);
        CHECK_NEAR(m.kappa_linear, 0.4418604651162791, EXACT);
        CHECK_NEAR(m.kappa_quadratic, 0.4418604651162791, EXACT);
        CHECK_NEAR(m.brier, 0.1801041666666667, EXACT);
        CHECK_NEAR(m.ece, 0.14375, EXACT);
        CHECK_NEAR(m.log_loss, 0.5327224019504767, EXACT);
    }
}

TEST(all_metrics_of_three_classes_match_scikit_learn)
{
    double p[90];
    mil_metrics m;
    open_context();
    softmax_rows(z3, 30, 3, 1, p);
    CHECK(mil_metrics_compute(ctx, p, y3, 30, 3, &m) == MIL_OK);
    CHECK(m.count == 30 && m.class_count == 3 && m.absent_count == 0);
    CHECK_NEAR(m.accuracy, 0.6, EXACT);
    CHECK_NEAR(m.balanced_accuracy, 0.6160714285714285, EXACT);
    CHECK_NEAR(m.auroc, 0.8382505175983437, EXACT);
    CHECK_NEAR(m.auroc_weighted, 0.8492753623188406, EXACT);
    CHECK_NEAR(m.average_precision, 0.7254818057273414, EXACT);
    CHECK_NEAR(m.f1_macro, 0.5886842105263158, EXACT);
    CHECK_NEAR(m.f1_weighted, 0.6280789473684211, EXACT);
    CHECK_NEAR(m.precision_macro, 0.6296296296296297, EXACT);
    CHECK_NEAR(m.recall_macro, 0.6160714285714285, EXACT);
    CHECK_NEAR(m.specificity_macro, 0.8260869565217391, EXACT);
    CHECK_NEAR(m.kappa, 0.40886699507389157, EXACT);
    CHECK_NEAR(m.kappa_linear, 0.5220588235294118, EXACT);
    CHECK_NEAR(m.kappa_quadratic, 0.6341463414634146, EXACT);
    CHECK_NEAR(m.brier, 0.5692272814840719, EXACT);
    CHECK_NEAR(m.ece, 0.2819078564742044, EXACT);
    CHECK_NEAR(m.log_loss, 1.1618740629365372, EXACT);
    CHECK(is_nan(m.f1) && is_nan(m.precision) && is_nan(m.sensitivity) && is_nan(m.specificity));
}

TEST(all_metrics_with_an_absent_class_match_scikit_learn)
{
    mil_metrics m;
    open_context();
    CHECK(mil_metrics_compute(ctx, p4, y4, 30, 4, &m) == MIL_OK);
    CHECK(m.count == 30 && m.class_count == 4 && m.absent_count == 1);
    CHECK_NEAR(m.accuracy, 0.4, EXACT);
    CHECK_NEAR(m.balanced_accuracy, 0.4523148148148148, EXACT);
    CHECK_NEAR(m.auroc, 0.7241501322751324, EXACT);
    CHECK_NEAR(m.auroc_weighted, 0.7040476190476191, EXACT);
    CHECK_NEAR(m.average_precision, 0.5800275340251583, EXACT);
    CHECK_NEAR(m.f1_macro, 0.30486111111111114, EXACT);
    CHECK_NEAR(m.f1_weighted, 0.4091666666666667, EXACT);
    CHECK_NEAR(m.precision_macro, 0.3181818181818182, EXACT);
    CHECK_NEAR(m.recall_macro, 0.33923611111111107, EXACT);
    CHECK_NEAR(m.specificity_macro, 0.7807142857142858, EXACT);
    CHECK_NEAR(m.kappa, 0.12903225806451601, EXACT);
    CHECK_NEAR(m.kappa_linear, 0.09442724458204321, EXACT);
    CHECK_NEAR(m.kappa_quadratic, 0.07407407407407407, EXACT);
    CHECK_NEAR(m.brier, 0.6238533333333333, EXACT);
    CHECK_NEAR(m.ece, 0.20433333333333334, EXACT);
    CHECK_NEAR(m.log_loss, 1.0968077877268414, EXACT);
}

TEST(metric_names_are_found_and_give_their_values)
{
    mil_metrics m;
    open_context();
    CHECK(mil_metrics_compute(ctx, s2, y2, 24, 1, &m) == MIL_OK);
    for (int i = 0; i < (int)MIL_METRIC_COUNT; i++) {
        CHECK(mil_metric_find(mil_metric_name((mil_metric)i)) == (mil_metric)i);
        CHECK(strlen(mil_metric_meaning((mil_metric)i)) > 0);
        CHECK(mil_metric_sign((mil_metric)i) == (i >= (int)MIL_METRIC_BRIER ? -1 : 1));
        CHECK(!is_nan(mil_metric_value(&m, (mil_metric)i)));
    }
    CHECK_NEAR(mil_metric_value(&m, MIL_METRIC_AUROC), m.auroc, 0);
    CHECK_NEAR(mil_metric_value(&m, MIL_METRIC_LOG_LOSS), m.log_loss, 0);
    CHECK(mil_metric_find("no such metric") == MIL_METRIC_COUNT && mil_metric_find(NULL) == MIL_METRIC_COUNT);
    CHECK(mil_metric_name(MIL_METRIC_COUNT) == NULL && mil_metric_sign(MIL_METRIC_COUNT) == 0);
    CHECK(is_nan(mil_metric_value(&m, MIL_METRIC_COUNT)) && is_nan(mil_metric_value(NULL, MIL_METRIC_AUROC)));
}

// ---- what is refused ----

// `status` must be an argument error whose sentence holds `part`; a new context for the next.
static void refused(mil_status status, const char *part)
{
    CHECK(status == MIL_ERROR_ARGUMENT);
    CHECK_CONTAINS(mil_error(ctx), part);
    open_context();
}

TEST(bad_labels_scores_and_sizes_are_named)
{
    const double s[] = { 0.2, 0.7 }, bad[] = { 0.2, (double)NAN }, inf[] = { 0.2, HUGE_VAL }, logit[] = { 0.2, 3 };
    const double sums[] = { 0.5, 0.5, 0.9, 0.7 };
    const int64_t y[] = { 0, 1 }, high[] = { 0, 2 }, low[] = { -1, 0 }, empty[] = { 0, 0, 0, 0 }, minus[] = { 3, -1, 0, 0 };
    double v = 42, j = 42;
    int64_t out[4];
    mil_metrics m;
    mil_cindex c;
    mil_interval interval;
    open_context();
    refused(mil_metric_auroc(ctx, s, high, 2, &v), "label 2 of bag 1 is outside 0..1");
    refused(mil_metric_auroc(ctx, s, low, 2, &v), "label -1 of bag 0");
    refused(mil_metric_auroc(ctx, bad, y, 2, &v), "bag 1 has a score that is not a number");
    refused(mil_metric_auroc(ctx, s, y, 0, &v), "nothing to measure");
    refused(mil_metric_auroc(ctx, s, y, -3, &v), "nothing to measure");
    refused(mil_metric_auroc(ctx, s, y, INT64_MAX, &v), "too large");
    refused(mil_metric_auroc(ctx, NULL, y, 2, &v), "NULL");
    refused(mil_metric_auroc_ovr(ctx, s, y, 2, 1, MIL_AVERAGE_MACRO, NULL, &v), "1 classes, at least 2");
    refused(mil_metric_average_precision(ctx, bad, y, 2, &v), "average precision");
    refused(mil_metric_youden(ctx, bad, y, 2, &v, &j), "youden");
    refused(mil_metric_brier(ctx, logit, y, 2, 1, &v), "probability 3");
    refused(mil_metric_brier(ctx, inf, y, 2, 1, &v), "probability inf");
    refused(mil_metric_log_loss(ctx, sums, y, 2, 2, &v), "bag 1 sum to 1.6");
    refused(mil_metric_ece(ctx, s, y, 2, 1, 0, &v), "0 bins");
    refused(mil_metric_ece(ctx, s, high, 2, 1, 15, &v), "label 2");
    refused(mil_metrics_compute(ctx, logit, y, 2, 1, &m), "probability 3");
    refused(mil_metrics_compute(ctx, s, y, 2, 0, &m), "0 classes");
    refused(mil_metrics_compute(ctx, bad, y, 2, 1, &m), "not a number");
    refused(mil_metrics_bootstrap(ctx, s, high, 2, 1, NULL, &interval), "label 2");
    refused(mil_metric_predict(ctx, bad, 2, 1, out), "not a number");
    refused(mil_metric_confusion(ctx, high, y, 2, 2, out), "predicted: label 2");
    refused(mil_metric_confusion(ctx, y, high, 2, 2, out), "label 2");
    refused(mil_metric_accuracy(ctx, empty, 2, &v), "empty");
    refused(mil_metric_kappa(ctx, minus, 2, MIL_KAPPA_LINEAR, &v), "confusion[0, 1] is -1");
    refused(mil_metric_f1(ctx, y, 1, MIL_AVERAGE_MACRO, NULL, &v), "1 classes");
    refused(mil_temperature_fit(ctx, inf, y, 2, 1, &v, &j), "infinite");
    refused(mil_temperature_fit(ctx, s, high, 2, 1, &v, &j), "label 2");
    refused(mil_metric_cindex(ctx, inf, s, y, 2, 1e-8, &c), "risk: bag 1");
    refused(mil_metric_cindex(ctx, s, bad, y, 2, 1e-8, &c), "times: bag 1");
    refused(mil_metric_cindex(ctx, s, s, high, 2, 1e-8, &c), "events: label 2");
    refused(mil_metric_cindex(ctx, s, s, y, 2, -1, &c), "tolerance");
    refused(mil_metric_cindex(ctx, s, s, NULL, 2, 0, &c), "NULL");
    CHECK(v == 42 && j == 42);                             // results are as they were
}

// ---- bootstrap ----

typedef struct { const double *x; int64_t calls, least, most; mil_status status; } mean_user;

static mil_status mean_of(mil_context *unused, void *user, const int64_t *indices, int64_t n, double *value)
{
    mean_user *u = (mean_user *)user;
    double sum = 0;
    (void)unused;
    for (int64_t i = 0; i < n; i++) {
        sum += u->x[indices[i]];
        if (indices[i] < u->least) u->least = indices[i];
        if (indices[i] > u->most) u->most = indices[i];
    }
    *value = sum / (double)n;
    return ++u->calls > 5 ? u->status : MIL_OK;
}

// The mean of 0..99 has a standard error of sqrt(833.25)/10 = 2.887; 4000 resamples know it to about 1%, so 6% is generous.
TEST(bootstrap_of_a_mean_finds_its_standard_error)
{
    double x[100];
    mean_user u = { NULL, 0, 1000, -1, MIL_OK };
    mil_bootstrap_options o = mil_bootstrap_default();
    mil_interval a, b;
    open_context();
    for (int i = 0; i < 100; i++) x[i] = i;
    u.x = x;
    o.resamples = 4000;
    o.seed = 3;
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 100, 0, &o, &a) == MIL_OK);
    CHECK(u.calls == 4001 && u.least == 0 && u.most == 99 && a.resamples == 4000 && a.stratified == 0);
    CHECK_NEAR(a.value, 49.5, EXACT);
    CHECK(fabs(a.mean - 49.5) <= 0.2);                     // 4 standard errors of the mean of resamples
    CHECK_NEAR(a.std / 2.8866, 1, 0.06);
    CHECK_NEAR((a.high - a.low) / (2 * 1.96 * 2.8866), 1, 0.06);
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 100, 0, &o, &b) == MIL_OK);
    CHECK(memcmp(&a, &b, sizeof a) == 0);                  // the same seed: the same bits
    o.seed = 4;
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 100, 0, &o, &b) == MIL_OK);
    CHECK(a.low != b.low || a.mean != b.mean);
}

// Given draws: means of x at the draws are 1, 2, 3, 4, 10. Percentiles at 50%: places 1 and 3.
TEST(bootstrap_uses_given_draws_and_linear_percentiles)
{
    const double x[] = { 1, 2, 3, 4, 10 };
    const int64_t draws[] = { 1, 1, 1, 1, 1,  4, 4, 4, 4, 4,  0, 0, 0, 0, 0,  3, 3, 3, 3, 3,  2, 2, 2, 2, 2 };
    const int64_t bad[] = { 0, 0, 0, 0, 5,  0, 0, 0, 0, 0 };
    mean_user u = { x, 0, 1000, -1, MIL_OK };
    mil_bootstrap_options o = mil_bootstrap_default();
    mil_interval i;
    open_context();
    o.resamples = 5;
    o.indices = draws;
    o.confidence = 0.5;
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 5, 0, &o, &i) == MIL_OK);
    CHECK_NEAR(i.value, 4, EXACT);
    CHECK_NEAR(i.mean, 4, EXACT);
    CHECK_NEAR(i.std, sqrt((9 + 4 + 1 + 0 + 36) / 4.0), EXACT);
    CHECK_NEAR(i.low, 2, EXACT);
    CHECK_NEAR(i.high, 4, EXACT);
    o.confidence = 0.9;                                    // places .2 and 3.8
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 5, 0, &o, &i) == MIL_OK);
    CHECK_NEAR(i.low, 1.2, EXACT);
    CHECK_NEAR(i.high, 8.8, EXACT);
    o.resamples = 2;
    o.indices = bad;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 5, 0, &o, &i), "indices: label 5 of bag 4");
}

TEST(bootstrap_stops_with_the_status_of_its_metric)
{
    const double x[] = { 1, 2, 3 };
    mean_user u = { x, 0, 1000, -1, MIL_ERROR_STATE };
    mil_interval i;
    open_context();
    CHECK(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, NULL, &i) == MIL_ERROR_STATE);
    CHECK(u.calls == 6);
}

TEST(bootstrap_refuses_bad_options)
{
    const double x[] = { 1, 2, 3 };
    mean_user u = { x, 0, 1000, -1, MIL_OK };
    mil_bootstrap_options o = mil_bootstrap_default();
    mil_interval i;
    open_context();
    o.resamples = 1;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, &o, &i), "1 resamples");
    o.resamples = INT64_MAX;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, &o, &i), "too many");
    o = mil_bootstrap_default();
    o.stratify = (mil_stratify)3;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, &o, &i), "stratify 3");
    o = mil_bootstrap_default();
    o.confidence = 1;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, &o, &i), "confidence 1");
    o.confidence = (double)NAN;
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 3, 0, &o, &i), "confidence");
    refused(mil_bootstrap(ctx, NULL, &u, NULL, 3, 0, NULL, &i), "no metric");
    refused(mil_bootstrap(ctx, mean_of, &u, NULL, 0, 0, NULL, &i), "nothing to measure");
}

// One positive among 40: a plain draw loses it with probability (39/40)^40 = 36%.
TEST(bootstrap_draws_class_by_class_when_a_class_would_vanish)
{
    double s[40];
    int64_t y[40];
    mil_bootstrap_options o = mil_bootstrap_default();
    mil_interval all[MIL_METRIC_COUNT];
    uint64_t state = 2;
    open_context();
    for (int i = 0; i < 40; i++) {
        s[i] = 0.05 + 0.9 * noise(&state);
        y[i] = i == 17;
    }
    CHECK(mil_metrics_bootstrap(ctx, s, y, 40, 1, &o, all) == MIL_OK);
    CHECK(all[MIL_METRIC_AUROC].resamples == 1000);
    CHECK(all[MIL_METRIC_AUROC].stratified > 280 && all[MIL_METRIC_AUROC].stratified < 450);
    o.stratify = MIL_STRATIFY_NEVER;
    CHECK(mil_metrics_bootstrap(ctx, s, y, 40, 1, &o, all) == MIL_OK);
    CHECK(all[MIL_METRIC_AUROC].resamples > 550 && all[MIL_METRIC_AUROC].resamples < 720);
    CHECK(all[MIL_METRIC_ACCURACY].resamples == 1000 && all[MIL_METRIC_ACCURACY].stratified == 0);
    o.stratify = MIL_STRATIFY_ALWAYS;
    CHECK(mil_metrics_bootstrap(ctx, s, y, 40, 1, &o, all) == MIL_OK);
    CHECK(all[MIL_METRIC_SENSITIVITY].stratified == 1000);
    CHECK_NEAR(all[MIL_METRIC_SENSITIVITY].std, 0, 0);     // the one positive is in every draw, once

    double p[40][3];                                       // a class that has no bag at all is not missed
    for (int i = 0; i < 40; i++) {
        p[i][0] = s[i] / 2;
        p[i][1] = 0.5 - s[i] / 2;
        p[i][2] = 0.5;
        y[i] = i % 2;
    }
    o.stratify = MIL_STRATIFY_NEEDED;
    CHECK(mil_metrics_bootstrap(ctx, p[0], y, 40, 3, &o, all) == MIL_OK);
    CHECK(all[MIL_METRIC_ACCURACY].resamples == 1000 && all[MIL_METRIC_ACCURACY].stratified == 0);
}

// The fast path counts how often each bag was drawn; the slow one gathers the bags and measures them.
typedef struct { const double *p; const int64_t *y; int64_t C; mil_metric which; } gather_user;

static mil_status gather(mil_context *c, void *user, const int64_t *indices, int64_t n, double *value)
{
    const gather_user *u = (const gather_user *)user;
    double p[4 * 30];
    int64_t y[30];
    mil_metrics m;
    mil_status status;
    for (int64_t i = 0; i < n; i++) {
        memcpy(p + i * u->C, u->p + indices[i] * u->C, (size_t)u->C * sizeof *p);
        y[i] = u->y[indices[i]];
    }
    status = mil_metrics_compute(c, p, y, n, u->C, &m);
    *value = mil_metric_value(&m, u->which);
    return status;
}

TEST(bootstrap_of_all_metrics_equals_the_one_of_each)
{
    const gather_user sets[] = { { p4, y4, 4, MIL_METRIC_COUNT }, { s2, y2, 1, MIL_METRIC_COUNT } };
    mil_bootstrap_options o = mil_bootstrap_default();
    open_context();
    o.resamples = 50;
    o.seed = UINT64_C(7784414403328510413);
    for (int k = 0; k < 2; k++) {
        const int64_t n = k == 0 ? 30 : 24;
        mil_interval all[MIL_METRIC_COUNT];
        CHECK(mil_metrics_bootstrap(ctx, sets[k].p, sets[k].y, n, sets[k].C, &o, all) == MIL_OK);
        for (int i = 0; i < (int)MIL_METRIC_COUNT; i++) {
            gather_user u = sets[k];
            mil_interval one;
            u.which = (mil_metric)i;
            CHECK(mil_bootstrap(ctx, gather, &u, u.y, n, u.C < 2 ? 2 : u.C, &o, &one) == MIL_OK);
            CHECK(one.resamples == all[i].resamples && one.stratified == all[i].stratified);
            if (one.resamples == 0) {
                CHECK(is_nan(all[i].value) && is_nan(all[i].low) && is_nan(all[i].mean) && is_nan(all[i].std));
                continue;
            }
            CHECK_NEAR(all[i].value, one.value, EXACT);
            CHECK_NEAR(all[i].mean, one.mean, EXACT);
            CHECK_NEAR(all[i].std, one.std, 1e-12);
            CHECK_NEAR(all[i].low, one.low, EXACT);
            CHECK_NEAR(all[i].high, one.high, EXACT);
            CHECK(all[i].low <= all[i].high);
        }
    }
}

TEST(bootstrap_of_the_cindex_surrounds_its_value)
{
    mil_interval i;
    open_context();
    CHECK(mil_cindex_bootstrap(ctx, risk20, time20, event20, 20, 1e-8, NULL, &i) == MIL_OK);
    CHECK_NEAR(i.value, 0.532520325203252, EXACT);
    CHECK(i.resamples == 1000 && i.low < i.value && i.value < i.high && i.low > 0 && i.high < 1);
    CHECK(fabs(i.mean - i.value) < 0.05 && i.std > 0.02 && i.std < 0.25);
}

// ---- allocation failures: the n-th fails, once or from then on; an error, no leak, results untouched ----

static mil_status measure(mil_context *c, int which, double *value)
{
    mil_metrics m;
    mil_cindex index;
    mil_interval all[MIL_METRIC_COUNT];
    mil_bootstrap_options o = mil_bootstrap_default();
    mean_user u = { s2, 0, 1000, -1, MIL_OK };
    o.resamples = 3;
    switch (which) {
    case 0: return mil_metric_auroc(c, s2, y2, 24, value);
    case 1: return mil_metric_average_precision_ovr(c, p4, y4, 30, 4, MIL_AVERAGE_MACRO, NULL, value);
    case 2: return mil_metric_ece(c, s2, y2, 24, 1, 15, value);
    case 3: return mil_metric_youden(c, s2, y2, 24, value, NULL);
    case 4: return mil_metrics_compute(c, p4, y4, 30, 4, &m);
    case 5: return mil_metric_cindex(c, risk20, time20, event20, 20, 0, &index);
    case 6: return mil_metrics_bootstrap(c, p4, y4, 30, 4, &o, all);
    case 7: return mil_bootstrap(c, mean_of, &u, y2, 24, 2, &o, all);
    default: return mil_cindex_bootstrap(c, risk20, time20, event20, 20, 0, &o, all);
    }
}

TEST(every_failing_allocation_is_an_error_without_a_leak)
{
    for (int which = 0; which < 9; which++)
        for (int once = 0; once < 2; once++) {
            int reached_end = 0;
            for (long at = 0; at < 50 && !reached_end; at++) {
                failing f = { -1, 0, 0 };
                double value = 42;
                size_t before;
                mil_status status;
                mil_context *c = make_context(&f);
                if (!CHECK(c != NULL)) return;
                before = f.live;
                f.left = at;
                f.once = once;
                status = measure(c, which, &value);
                reached_end = status == MIL_OK;
                CHECK(reached_end || (status == MIL_ERROR_NO_MEMORY && value == 42));
                CHECK(reached_end ? at > 0 : f.live == before);
                f.left = -1;
                CHECK(f.live == before);
                mil_context_free(c);
                CHECK(f.live == 0);
            }
            CHECK(reached_end);
        }
}

TEST(contexts_are_closed)
{
    mil_context_free(ctx);
    ctx = NULL;
}

TESTS(
    T(predict_takes_the_lower_class_on_ties)
    T(confusion_has_truth_in_rows)
    T(per_class_values_by_hand)
    T(class_neither_seen_nor_predicted_is_left_out_of_means)
    T(class_predicted_but_not_seen_counts_zero_in_recall_and_not_in_balanced_accuracy)
    T(kappa_by_hand)
    T(kappa_of_a_single_class_is_undefined)
    T(many_classes_give_what_plain_formulas_give)
    T(auroc_and_average_precision_by_hand)
    T(auroc_of_equal_scores_is_one_half)
    T(auroc_takes_infinite_scores)
    T(auroc_of_one_class_is_undefined)
    T(auroc_equals_the_count_of_pairs)
    T(one_vs_rest_names_absent_classes_and_leaves_them_out)
    T(youden_threshold_by_hand_and_from_roc_curve)
    T(calibration_by_hand)
    T(log_loss_of_an_impossible_truth_is_finite)
    T(temperature_matches_a_reference_minimiser)
    T(temperature_scales_with_the_logits_and_leaves_log_loss_at_its_minimum)
    T(temperature_without_an_optimum_is_an_end_of_its_range)
    T(temperature_of_saturated_right_logits_is_the_lowest)
    T(temperature_of_logits_near_the_largest_double_is_no_nonsense)
    T(cindex_by_hand)
    T(cindex_with_ties_matches_its_definition)
    T(cindex_equals_the_count_of_pairs_for_any_tolerance)
    T(cindex_without_a_pair_is_undefined)
    T(all_binary_metrics_match_scikit_learn)
    T(all_metrics_of_three_classes_match_scikit_learn)
    T(all_metrics_with_an_absent_class_match_scikit_learn)
    T(metric_names_are_found_and_give_their_values)
    T(bad_labels_scores_and_sizes_are_named)
    T(bootstrap_of_a_mean_finds_its_standard_error)
    T(bootstrap_uses_given_draws_and_linear_percentiles)
    T(bootstrap_stops_with_the_status_of_its_metric)
    T(bootstrap_refuses_bad_options)
    T(bootstrap_draws_class_by_class_when_a_class_would_vanish)
    T(bootstrap_of_all_metrics_equals_the_one_of_each)
    T(bootstrap_of_the_cindex_surrounds_its_value)
    T(every_failing_allocation_is_an_error_without_a_leak)
    T(contexts_are_closed)
)
