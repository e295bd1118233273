// build: float double
// MIL-Lab's abmil, wikg, dsmil, dftd and clam: every parity case, and every parameter of every option by finite differences.
#include "mil.h"
#include "check.h"
#include "replay.h"

// The case as it is, and under each way of planning memory; in double, differences too.
static void run_case(const char *name)
{
    enum { PLANS = 5, DIFFERENCES = PLANS };
    static const mil_tape_option plans[PLANS] = { MIL_TAPE_INPUT_GRADS, MIL_TAPE_POISON, MIL_TAPE_NO_GROUPS, MIL_TAPE_NO_REUSE, MIL_TAPE_RECOMPUTE };
    char path[256];
    mil_context *ctx;
    mil_context_options o = mil_context_options_default();
    replay r;
    // A masked score is a number so large that the score is lost in it, yet the references' gradient goes through the sum. In a
    // bag that is masked whole this is the gradient, and no difference quotient shows it.
    const int last = MIL_REAL_IS_FLOAT || strstr(name, "all-masked") ? DIFFERENCES - 1 : DIFFERENCES;
    o.threads = 1;
    if (!CHECK(mil_context_create(&ctx, &o) == MIL_OK)) return;
    for (int i = 0; i <= last; i++) {
        snprintf(path, sizeof path, "tests/cases/millab-%s.safetensors", name);
        if (replay_open(&r, ctx, path)) {
            r.training = r.training || i == DIFFERENCES;
            if (i < PLANS) mil_tape_set(r.tape, plans[i], 1);
            if (i == DIFFERENCES) replay_differences(&r);
            else replay_run(&r);
        }
        CHECK_STRING(r.why, "");
        if (r.why[0]) printf("%s: err %.3g (%s)\n", name, r.err, r.worst);
        replay_free(&r);
    }
    CHECK(mil_context_bytes(ctx) == 0);
    mil_context_free(ctx);
}

// X(name of the test, name of the case)
#define CASES(X) \
    X(abmil_bag_all_masked_train, "abmil-bag-all-masked-train") \
    X(abmil_base_eval, "abmil-base-eval") \
    X(abmil_base_train, "abmil-base-train") \
    X(abmil_bce_train, "abmil-bce-train") \
    X(abmil_mask_batch_train, "abmil-mask-batch-train") \
    X(abmil_n1_eval, "abmil-n1-eval") \
    X(abmil_ungated_fc3_train, "abmil-ungated-fc3-train") \
    X(clam_base_eval, "clam-base-eval") \
    X(clam_base_train, "clam-base-train") \
    X(clam_ce_subtyping_ungated_fc2_train, "clam-ce-subtyping-ungated-fc2-train") \
    X(clam_ce_train, "clam-ce-train") \
    X(clam_k_all_eval, "clam-k-all-eval") \
    X(clam_subtyping_train, "clam-subtyping-train") \
    X(clam_svm_hard_train, "clam-svm-hard-train") \
    X(dftd_afs_train, "dftd-afs-train") \
    X(dftd_base_eval, "dftd-base-eval") \
    X(dftd_base_train, "dftd-base-train") \
    X(dftd_few_eval, "dftd-few-eval") \
    X(dftd_maxmins_k2_train, "dftd-maxmins-k2-train") \
    X(dftd_maxs_k0_eval, "dftd-maxs-k0-eval") \
    X(dftd_maxs_k0_train, "dftd-maxs-k0-train") \
    X(dftd_maxs_nores_train, "dftd-maxs-nores-train") \
    X(dftd_overlap_eval, "dftd-overlap-eval") \
    X(dsmil_bag_all_masked_train, "dsmil-bag-all-masked-train") \
    X(dsmil_base_eval, "dsmil-base-eval") \
    X(dsmil_base_train, "dsmil-base-train") \
    X(dsmil_bce_train, "dsmil-bce-train") \
    X(dsmil_fc2_mask_batch_train, "dsmil-fc2-mask-batch-train") \
    X(dsmil_n1_eval, "dsmil-n1-eval") \
    X(wikg_base_eval, "wikg-base-eval") \
    X(wikg_base_train, "wikg-base-train") \
    X(wikg_gcn_mean_relu_train, "wikg-gcn-mean-relu-train") \
    X(wikg_mean_batch2_eval, "wikg-mean-batch2-eval") \
    X(wikg_sage_max_tanh_train, "wikg-sage-max-tanh-train") \
    X(wikg_topk_all_eval, "wikg-topk-all-eval")

#define CASE_TEST(test, name) TEST(test) { run_case(name); }
CASES(CASE_TEST)

static mil_context *context_new(void)
{
    mil_context *ctx = NULL;
    mil_context_options o = mil_context_options_default();
    o.threads = 1;
    CHECK(mil_context_create(&ctx, &o) == MIL_OK);
    return ctx;
}

// ---- options that no case has, by finite differences ----
typedef struct setting { const char *name, *options; int64_t B, N; } setting;

#define SMALL "in_dim=7 embed_dim=6 "
static const setting settings[] = {
    { "abmil",                  SMALL "attn_dim=5 num_fc_layers=2 dropout=0.3 num_classes=3", 3, 9 },
    { "abmil",                  SMALL "attn_dim=5 gate=false", 1, 1 },
    { "dsmil",                  SMALL "attn_dim=5 num_fc_layers=2 dropout=0.3 dropout_v=0.2 num_classes=3", 2, 9 },
    { "dsmil",                  SMALL "attn_dim=5 mask_critical=true num_classes=1", 1, 8 },
    { "wikg",                   SMALL "agg_type=gcn pool=attn act=tanh dropout=0.3", 2, 9 },
    { "wikg",                   SMALL "agg_type=gcn pool=max act=leaky_relu dropout=0", 2, 9 },
    { "wikg",                   SMALL "agg_type=sage pool=mean act=relu topk=1 num_classes=3", 1, 9 },
    { "wikg",                   SMALL "agg_type=sage pool=attn act=leaky_relu topk=9", 1, 9 },
    { "wikg",                   SMALL "agg_type=bi-interaction pool=mean act=tanh topk=10", 1, 12 },
    { "wikg",                   SMALL "agg_type=bi-interaction pool=max act=relu topk=1", 1, 1 },
    { "dftd",                   SMALL "attention_dim=4 num_residuals=1 num_group=3 paper_attention=true", 1, 11 },
    { "dftd",                   SMALL "attention_dim=4 num_residuals=1 num_group=3 total_instance=6 num_classes=3 paper_attention=true", 1, 11 },
    { "dftd",                   SMALL "attention_dim=4 num_residuals=0 num_group=3 total_instance=30 distill=MaxS", 1, 7 },
    { "dftd",                   SMALL "attention_dim=4 num_residuals=1 num_group=3 distill=MaxS", 1, 7 },
    { "dftd",                   SMALL "attention_dim=4 num_residuals=1 num_group=1 num_classes=1", 1, 1 },
    { "dftd.base_afs",          SMALL "attention_dim=4 num_residuals=1 num_group=5 paper_attention=true", 1, 3 },
    { "clam",                   SMALL "attention_dim=4 k_sample=3 num_classes=3 dropout=0.3", 1, 9 },
    { "clam.base_subtyping",    SMALL "attention_dim=4 k_sample=3 num_classes=3 gate=false", 1, 4 },
    { "clam.base_ce_subtyping", SMALL "attention_dim=4 k_sample=1 num_classes=1 bag_weight=0.2 n_fc_layers=2", 1, 1 },
};

static void differences_of(const setting *s)
{
    const int64_t labels[3] = { 0, 1, 0 };
    mil_context *ctx = context_new();
    replay r;
    if (replay_make(&r, ctx, s->name, s->options, s->B, s->N, labels, 17)) replay_differences(&r);
    CHECK_STRING(r.why, "");
    if (r.why[0]) printf("%s %s\n", s->name, s->options);
    replay_free(&r);
    mil_context_free(ctx);
}

TEST(every_option_agrees_with_differences)
{
    for (size_t i = 0; i < sizeof settings / sizeof *settings && !MIL_REAL_IS_FLOAT; i++) differences_of(&settings[i]);
}

TEST(dftd_trains_on_a_binary_target)
{
    mil_context *ctx = context_new();
    const int64_t label = 0;
    replay r;
    if (replay_make(&r, ctx, "dftd", SMALL "attention_dim=4 num_residuals=1 num_group=3 num_classes=1", 1, 8, &label, 5)) {
        r.target = mil_target_value(1);
        if (!MIL_REAL_IS_FLOAT) replay_differences(&r);
        else CHECK(replay_record(&r));
    }
    CHECK_STRING(r.why, "");
    replay_free(&r);
    mil_context_free(ctx);
}

// ---- what the reference counts: trainable numbers with encoder uni and 2 classes ----
TEST(parameter_counts_are_the_references)
{
    static const struct { const char *name; int64_t count; } models[] = {
        { "abmil", 920195 }, { "wikg", 2103299 }, { "dftd", 2886918 }, { "dsmil", 993159 }, { "clam", 922247 } };
    mil_context *ctx = context_new();
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        mil_model *model = mil_create(ctx, models[i].name, NULL);
        CHECK(mil_model_parameter_count(model) == models[i].count);
        mil_model_free(model);
    }
    mil_context_free(ctx);
}

static double bound(mil_model *model, const char *key)     // the largest magnitude among a parameter's values
{
    const mil_param *p = mil_model_find(model, key);
    double top = 0;
    for (int64_t i = 0; p && i < p->count; i++) if (fabs((double)((const mil_real *)p->data)[i]) > top) top = fabs((double)((const mil_real *)p->data)[i]);
    return top;
}

TEST(fresh_weights_follow_the_references_rules)
{
    mil_context *ctx = context_new();
    mil_model *model = mil_create(ctx, "dsmil", NULL);
    CHECK_NEAR(bound(model, "model.b_classifier.v.1.weight"), sqrt(6.0 / 512), 1e-3);
    CHECK(bound(model, "model.b_classifier.v.1.bias") == 0);
    CHECK_NEAR(bound(model, "model.classifier.weight"), 1 / sqrt(2 * 512.0), 1e-3);            // a 1-d convolution keeps torch's start
    CHECK(bound(model, "model.classifier.bias") > 0 && bound(model, "model.classifier.bias") <= 1 / sqrt(2 * 512.0));
    CHECK_NEAR(bound(model, "model.b_classifier.fcc.weight"), 1 / sqrt(3 * 512.0), 1e-3);
    CHECK(bound(model, "model.b_classifier.norm.weight") == 1 && bound(model, "model.b_classifier.norm.bias") == 0);
    mil_model_free(model);
    model = mil_create(ctx, "clam", "num_classes=3");
    const mil_param *labels = mil_model_find(model, "model.instance_loss_fn.labels");
    CHECK(labels && labels->dtype == MIL_I64 && !labels->trainable && ((const int64_t *)labels->data)[0] == 0 && ((const int64_t *)labels->data)[1] == 1);
    CHECK(mil_model_find(model, "model.instance_classifiers.2.weight") != NULL);
    mil_model_free(model);
    model = mil_create(ctx, "clam.base_ce", NULL);
    CHECK(model && !mil_model_find(model, "model.instance_loss_fn.labels"));
    mil_model_free(model);
    mil_context_free(ctx);
}

// ---- outputs ----
static double *read_node(mil_node *n)                      // its values; NULL when it has none
{
    mil_real *x = n ? (mil_real *)calloc((size_t)n->count + 1, sizeof *x) : NULL;
    double *y = x ? (double *)calloc((size_t)n->count + 1, sizeof *y) : NULL;
    const int ok = y && mil_node_read(n, x, n->count) == MIL_OK;
    for (int64_t i = 0; ok && i < n->count; i++) y[i] = (double)x[i];
    free(x);
    if (ok) return y;
    free(y);
    return NULL;
}

// Without dropout, summands of the instances plus the head's bias are the logits.
static void contributions_of(const char *name, const char *options, int64_t B, int64_t N, const char *bias)
{
    mil_context *ctx = context_new();
    replay r;
    CHECK(replay_make(&r, ctx, name, options, B, N, NULL, 3));
    r.training = 0;
    if (CHECK(replay_record(&r) && r.out.contribution && !r.out.loss)) {
        mil_node_keep(r.out.contribution);
        mil_node_keep(r.out.logits);
        CHECK(mil_tape_run(r.tape) == MIL_OK);
        const int64_t C = r.out.logits->shape[1];
        double *part = read_node(r.out.contribution), *logits = read_node(r.out.logits);
        for (int64_t b = 0; b < B; b++)
            for (int64_t c = 0; c < C; c++) {
                double sum = (double)((const mil_real *)mil_model_find(r.model, bias)->data)[c];
                for (int64_t n = 0; n < N; n++) sum += part[(b * N + n) * C + c];
                CHECK_NEAR(logits[b * C + c], sum, MIL_REAL_IS_FLOAT ? 2e-5 : 1e-12);
            }
        free(part);
        free(logits);
    }
    CHECK_STRING(r.why, "");
    replay_free(&r);
    mil_context_free(ctx);
}

TEST(contributions_sum_to_the_logits)
{
    contributions_of("abmil", SMALL "attn_dim=4 num_classes=3", 2, 9, "classifier.bias");
    contributions_of("clam", SMALL "attention_dim=4 num_classes=3 k_sample=100", 1, 9, "classifier.bias");
    contributions_of("dftd", SMALL "attention_dim=4 num_residuals=1", 1, 9, "attCls.classifier.fc.bias");
    contributions_of("dftd", SMALL "attention_dim=4 num_residuals=1 num_group=2 total_instance=4", 1, 9, "attCls.classifier.fc.bias");
    contributions_of("dftd", SMALL "attention_dim=4 num_residuals=1 num_group=2 total_instance=12 paper_attention=true", 1, 9, "attCls.classifier.fc.bias");
    contributions_of("dftd.base_afs", SMALL "attention_dim=4 num_residuals=1 paper_attention=true", 1, 9, "attCls.classifier.fc.bias");
    contributions_of("dftd.base_afs", SMALL "attention_dim=4 num_residuals=1", 1, 5, "attCls.classifier.fc.bias");
}

// The logits of instances begin .. begin + N - 1 of r's bags, with a mask or none.
static double *logits_of(replay *r, int64_t bag, int64_t B, int64_t N, const float *mask)
{
    const int64_t D = mil_model_in_dim(r->model), all = r->bag.features.shape[1];
    int64_t shape[3];
    shape[0] = B;
    shape[1] = N;
    shape[2] = D;
    mil_bag b;
    memset(&b, 0, sizeof b);
    b.features = mil_tensor_make(r->features + bag * all * D, MIL_REAL_DTYPE, 3, shape);
    if (mask) b.mask = mil_tensor_make(mask, MIL_F32, 2, shape);
    mil_outputs out;
    mil_tape_reset(r->tape);
    mil_tape_training(r->tape, 0);
    mil_model_record(r->tape, r->model, &b, NULL, &out);
    mil_node_keep(out.logits);
    return mil_tape_run(r->tape) == MIL_OK ? read_node(out.logits) : NULL;
}

TEST(a_batch_gives_what_its_bags_give)
{
    static const char *const models[] = { "abmil", "dsmil", "wikg" };
    mil_context *ctx = context_new();
    for (int i = 0; i < 3; i++) {
        replay r;
        CHECK(replay_make(&r, ctx, models[i], SMALL, 3, 70, NULL, 4));
        double *all = logits_of(&r, 0, 3, 70, NULL);
        for (int64_t b = 0; b < 3; b++) {
            double *one = logits_of(&r, b, 1, 70, NULL);
            if (CHECK(all && one)) for (int c = 0; c < 2; c++) CHECK_NEAR(one[c], all[2 * b + c], MIL_REAL_IS_FLOAT ? 1e-5 : 1e-12);
            free(one);
        }
        free(all);
        replay_free(&r);
    }
    mil_context_free(ctx);
}

TEST(dsmil_with_mask_critical_ignores_padding_and_nan_in_it)
{
    mil_context *ctx = context_new();
    replay r;
    float mask[9] = { 1, 1, 1, 1, 1, 0, 0, 0, 0 };
    CHECK(replay_make(&r, ctx, "dsmil", SMALL "mask_critical=true", 1, 9, NULL, 6));
    double *bare = logits_of(&r, 0, 1, 5, NULL);
    for (int64_t i = 5 * 7; i < 9 * 7; i++) r.features[i] = (mil_real)(i % 3 ? (double)NAN : 100);
    double *padded = logits_of(&r, 0, 1, 9, mask);
    if (CHECK(bare && padded)) for (int c = 0; c < 2; c++) CHECK_NEAR(padded[c], bare[c], MIL_REAL_IS_FLOAT ? 1e-5 : 1e-12);
    free(bare);
    free(padded);
    replay_free(&r);
    mil_context_free(ctx);
}

// The instance loss of class y's bag, the class told as a label or by a target per logit, 1 for y and 0 for others.
static double instance_loss_of(const char *options, int64_t C, int64_t y, int one_hot)
{
    double values[4] = { 0, 0, 0, 0 }, *loss = NULL, found = (double)NAN;
    mil_context *ctx = context_new();
    replay r;
    if (CHECK(replay_make(&r, ctx, "clam", options, 1, 9, &y, 21))) {
        values[y] = 1;
        if (one_hot) {
            r.target = mil_target_value(0);
            r.target.values = values;
            r.target.count = C;
        }
        if (CHECK(replay_record(&r))) {
            mil_node *n = mil_outputs_find(&r.out, "instance_loss");
            mil_node_keep(n);
            CHECK(mil_tape_run(r.tape) == MIL_OK);
            loss = read_node(n);
        }
        if (CHECK(loss != NULL)) found = loss[0];
        free(loss);
    }
    CHECK_STRING(r.why, "");
    replay_free(&r);
    mil_context_free(ctx);
    return found;
}

TEST(clam_finds_the_class_of_a_target_per_logit)
{
    static const struct { const char *options; int64_t C; } models[] = {
        { SMALL "attention_dim=4 k_sample=2 dropout=0", 2 }, { SMALL "attention_dim=4 k_sample=2 dropout=0 num_classes=4", 4 },
        { SMALL "attention_dim=4 k_sample=2 dropout=0 instance_loss_fn=ce", 2 },
        { SMALL "attention_dim=4 k_sample=2 dropout=0 instance_loss_fn=ce subtyping=true num_classes=3", 3 }
    };
    for (int k = 0; k < 4; k++) {
        double first = 0;
        for (int64_t y = 0; y < models[k].C; y++) {
            const double by_label = instance_loss_of(models[k].options, models[k].C, y, 0);
            CHECK(instance_loss_of(models[k].options, models[k].C, y, 1) == by_label);
            if (y == 0) first = by_label;
            else CHECK(by_label != first);                 // the classes can be told apart by it
        }
    }
}

// ---- refused ----
static void refused(const char *name, const char *options, int64_t B, int64_t N, const int64_t *label, const float *mask, const char *part)
{
    mil_context *ctx = context_new();
    replay r;
    CHECK(replay_make(&r, ctx, name, options, B, N, label, 3));
    if (mask) r.bag.mask = mil_tensor_make(mask, MIL_F32, 2, r.bag.features.shape);
    CHECK(!replay_record(&r));
    CHECK_CONTAINS(r.why, part);
    replay_free(&r);
    mil_context_free(ctx);
}

TEST(bags_and_labels_that_do_not_fit_are_named)
{
    const int64_t zero = 0, three = 3;
    const float mask[8] = { 1, 1, 1, 1, 1, 1, 1, 1 };
    refused("wikg", SMALL "topk=4", 1, 3, &zero, NULL, "topk is 4, the bag has 3 instances");
    refused("clam", SMALL, 1, 7, &zero, NULL, "k_sample is 8, the bag has 7 instances; create the model with a smaller k_sample");
    refused("clam", SMALL, 1, 8, &three, NULL, "label 3 of bag 0 is not one of the classes 0..1");
    refused("dftd", SMALL, 1, 8, &three, NULL, "label 3");
    refused("dftd", SMALL, 2, 4, NULL, NULL, "the model takes one");
    refused("clam", SMALL, 2, 4, NULL, NULL, "the model takes one");
    refused("wikg", SMALL, 1, 8, NULL, mask, "no mask");
    refused("clam", SMALL, 1, 8, NULL, mask, "no mask");
}

// Each would be a class that is none: NaN as a whole number, the first of no labels.
TEST(clam_refuses_targets_that_name_no_class)
{
    static const char *const parts[] = { "target value 0 is", "target value 0 is", "target value 1 is", "mil_target.count is 0", "0 target values" };
    const int64_t zero = 0;
    for (int k = 0; k < 5; k++) {
        double *values = (double *)malloc(2 * sizeof *values);                 // of its own, so that a sanitizer sees what is read beyond
        void *labels = malloc(1);
        mil_context *ctx = context_new();
        replay r;
        if (CHECK(values && labels && replay_make(&r, ctx, "clam", k < 2 ? SMALL "k_sample=2 num_classes=1" : SMALL "k_sample=2", 1, 8, &zero, 3))) {
            values[0] = 0;
            values[1] = (double)NAN;
            if (k < 2) r.target = mil_target_value(k ? -(double)INFINITY : (double)NAN);
            if (k == 2 || k == 4) {
                r.target = mil_target_value(0);
                r.target.values = values;
                r.target.count = k == 2 ? 2 : 0;
            }
            if (k == 3) {
                r.target.labels = (const int64_t *)labels;
                r.target.count = 0;
            }
            CHECK(!replay_record(&r));
            CHECK_CONTAINS(r.why, parts[k]);
            CHECK(mil_error_status(ctx) == MIL_ERROR_ARGUMENT);
            replay_free(&r);
        }
        free(values);
        free(labels);
        mil_context_free(ctx);
    }
}

TEST(clam_scores_a_bag_smaller_than_k_without_a_label)
{
    mil_context *ctx = context_new();
    replay r;
    CHECK(replay_make(&r, ctx, "clam", SMALL, 1, 3, NULL, 3));
    CHECK(replay_record(&r) && r.out.logits && !r.out.loss && !mil_outputs_find(&r.out, "instance_loss"));
    replay_free(&r);
    mil_context_free(ctx);
}

// ---- dftd's other spelling of the first head ----
TEST(dftd_loads_an_adapted_checkpoint)
{
    mil_context *ctx = context_new();
    mil_model *model = mil_create(ctx, "dftd", SMALL "attention_dim=4 num_residuals=0");
    CHECK(model && mil_model_find(model, "model.classifier.weight") == mil_model_find(model, "model.classifier.fc.weight"));
    CHECK(mil_model_find(model, "model.classifier.bias") == mil_model_find(model, "model.classifier.fc.bias"));
    mil_model_free(model);
    mil_context_free(ctx);
}

#define CASE_ROW(test, name) T(test)
TESTS(CASES(CASE_ROW) T(every_option_agrees_with_differences) T(dftd_trains_on_a_binary_target) T(parameter_counts_are_the_references)
      T(fresh_weights_follow_the_references_rules) T(contributions_sum_to_the_logits) T(a_batch_gives_what_its_bags_give)
      T(dsmil_with_mask_critical_ignores_padding_and_nan_in_it) T(bags_and_labels_that_do_not_fit_are_named)
      T(clam_scores_a_bag_smaller_than_k_without_a_label) T(dftd_loads_an_adapted_checkpoint)
      T(clam_finds_the_class_of_a_target_per_logit) T(clam_refuses_targets_that_name_no_class))
