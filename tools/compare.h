// What the programs share that train every model of the library on the same bags.
#ifndef TOOL_COMPARE_H
#define TOOL_COMPARE_H
#include "run.h"

// A context of one thread: steps this small are over before a second one has woken up. Results do not depend on it.
TOOL_FN mil_context *small_context(void)
{
    mil_context_options o = mil_context_options_default();
    mil_context *ctx;
    o.threads = 1;
    const mil_status status = mil_context_create(&ctx, &o);
    if (status != MIL_OK) tool_fail("%s", mil_status_text(status));
    return ctx;
}

// Small widths, so that all models train in seconds to minutes: whichever of these options a model has. Two models pick k instances
// and refuse a bag of fewer: their k is lowered to the smallest bag.
TOOL_FN char *small_options(mil_context *ctx, const char *name, int64_t smallest_bag)
{
    static const char *const small[][2] = { { "embed_dim", "64" }, { "mlp_dim", "64" }, { "encoder_mlp_dim", "128" }, { "attn_dim", "32" }, { "att_dim", "32" },
                                            { "attention_dim", "32" }, { "trans_dim", "8" }, { "num_landmarks", "32" }, { "feat_ext_sizes", "[64]" },
                                            { "feat_ext_activations", "[relu]" } };
    text t = { NULL, 0, 0 };
    mil_model *model = mil_create(ctx, name, NULL);
    if (!model) tool_fail("%s", mil_error(ctx));
    text_put(&t, "", 0);
    for (size_t k = 0; k < sizeof small / sizeof *small; k++)
        if (has_option(mil_model_architecture(model), small[k][0])) text_add(&t, "%s=%s ", small[k][0], small[k][1]);
    if (smallest_bag < 8 && has_option(mil_model_architecture(model), "k_sample")) text_add(&t, "k_sample=%lld ", (long long)smallest_bag);
    if (smallest_bag < 4 && has_option(mil_model_architecture(model), "agg_type")) text_add(&t, "topk=%lld ", (long long)smallest_bag);
    mil_model_free(model);
    return t.data;
}

// AUROC over the test bags with numbers first..last-1, two classes. Logits of different folds are taken as comparable.
TOOL_FN double bag_auroc(mil_context *ctx, const predictions *p, int64_t first, int64_t last)
{
    double *x = TOOL_NEW(double, p->count), value;
    int64_t *y = TOOL_NEW(int64_t, p->count), n = 0;
    for (int64_t k = 0; k < p->count; k++) {
        const prediction *q = &p->at[k];
        if (strcmp(q->split, "test") != 0 || q->bag < first || q->bag >= last) continue;
        x[n] = p->logits == 1 ? q->logits[0] : q->logits[1] - q->logits[0];
        y[n++] = q->label;
    }
    tool_check(ctx, mil_metric_auroc(ctx, x, y, n, &value));
    free(x);
    free(y);
    return value;
}

// Whether words name this model: "clam.base_ce", or "clam" for all of its configs. No words: every model.
TOOL_FN int model_wanted(const mil_architecture *m, const char *config, int count, char *const *words)
{
    char *name = tool_format("%s.%s", m->name, config);
    int wanted = count < 1;
    for (int k = 0; k < count; k++) wanted |= strcmp(name, words[k]) == 0 || strcmp(m->name, words[k]) == 0;
    free(name);
    return wanted;
}
#endif
