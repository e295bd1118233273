// Writes a model of one's own with the public ops: noisy-or pooling. Once registered, it is created, trained, saved, loaded
// and streamed like those that come with the library.
//
// Each patch is tumour with probability p_n = sigmoid(w x_n + b); a slide is positive when at least one patch is:
//     1 - P = prod_n (1 - p_n)
// With S = sum_n softplus(w x_n + b) = -log(1 - P), the slide's logit is log(P / (1 - P)) = S + log(1 - e^-S).
//
//     cc -O2 own_model.c -lm -lpthread && ./a.out
//
// Expected output (within 0.1):
// noisyor.base.uni.none: 9 parameters
// after 15 epochs: accuracy 1.00 on slides, 1.00 on patches that no label was given for
// streamed in two pushes: the same logit
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <stdio.h>
#include <string.h>

// ---- the model ----
typedef struct noisyor_config { int64_t in_dim, num_classes; } noisyor_config;
typedef struct noisyor { mil_linear_layer score; } noisyor;

static const mil_option noisyor_options[] = {
    { "in_dim",      MIL_OPTION_INT, offsetof(noisyor_config, in_dim),      "1024", "1..1000000", "width of a patch" },
    { "num_classes", MIL_OPTION_INT, offsetof(noisyor_config, num_classes), "1",    "1..1",       "one logit" }
};
static const mil_config noisyor_configs[] = { { "base", "" } };

static void noisyor_declare(mil_builder *b, void *model, const void *config)
{
    const noisyor_config *c = (const noisyor_config *)config;
    ((noisyor *)model)->score = mil_declare_linear(b, c->in_dim, 1, 1, MIL_LINEAR_TORCH, "score");     // score.weight, score.bias
}

static void noisyor_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    (void)config;
    mil_node *s = mil_linear_forward(&((const noisyor *)model)->score, in->features);                  // [B, N, 1]
    mil_node *S = mil_squeeze(mil_sum(mil_softplus(s), 1), 1);                                         // [B, 1]
    mil_node *P = mil_affine(mil_exp(mil_affine(S, -1, 0)), -1, 1);                                    // 1 - e^-S
    out->attention_scores = s;
    out->slide_feats = S;
    out->logits = mil_add(S, mil_log(P));                                                              // [B, 1]
    if (in->target) out->loss = mil_loss_node(out->logits, in->target);
}

static mil_architecture noisyor_architecture(void)
{
    mil_architecture a;
    memset(&a, 0, sizeof a);                              // what is not named below is not there
    a.name = "noisyor";
    a.title = "noisy-or pooling";
    a.citation = "Maron and Lozano-Perez 1998";
    a.prefix = "";
    a.options = noisyor_options;
    a.option_count = 2;
    a.config_size = sizeof(noisyor_config);
    a.configs = noisyor_configs;
    a.config_count = 1;
    a.model_size = sizeof(noisyor);
    a.head = "";
    a.flags = MIL_MODEL_BATCHES;
    a.declare = noisyor_declare;
    a.forward = noisyor_forward;
    return a;
}

// ---- data: a patch is tumour when its features are shifted; a slide of 10 patches has 0 to 3 of them ----
enum { D = 8, N = 10, BAGS = 200 };
static float features[BAGS][N][D];
static int   tumour[BAGS];                                // the first so many patches of a slide

static void make_slides(void)
{
    uint32_t state = 1;
    for (int b = 0; b < BAGS; b++) {
        tumour[b] = b % 2 ? 1 + b / 2 % 3 : 0;
        for (int i = 0; i < N * D; i++) {
            state = state * 1664525u + 1013904223u;
            features[b][i / D][i % D] = (float)(state >> 8) / (1 << 23) - 1 + (i / D < tumour[b] ? 0.8f : -0.4f);
        }
    }
}

int main(void)
{
    const mil_architecture architecture = noisyor_architecture();
    mil_context *ctx;
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;
    make_slides();
    mil_register(ctx, &architecture);
    mil_model *model = mil_create(ctx, "noisyor", "in_dim=8");
    mil_trainer *trainer = mil_trainer_create(model, "optimizer=sgd lr=0.05 momentum=0.9");
    mil_scorer *scorer = NULL;
    mil_status status = mil_error_status(ctx);
    if (status == MIL_OK) printf("%s: %d parameters\n", mil_model_name(model), (int)mil_model_parameter_count(model));

    for (int i = 0; i < 15 * BAGS && status == MIL_OK; i++) {
        const int b = i * 37 % BAGS;
        const mil_bag bag = mil_bag_make(features[b][0], N, D);
        const mil_target target = mil_target_value(tumour[b] > 0);             // binary cross-entropy with one logit
        status = mil_trainer_step(trainer, &bag, &target, NULL, NULL);
    }

    int slides = 0, patches = 0;
    float logit = 0, score[N];
    if (status == MIL_OK && !(scorer = mil_scorer_create(model, NULL))) status = mil_error_status(ctx);
    for (int b = 0; b < BAGS && status == MIL_OK; b++) {
        const mil_bag bag = mil_bag_make(features[b][0], N, D);
        status = mil_scorer_score(scorer, &bag);
        if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_LOGITS, &logit, 1);
        if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_ATTENTION, score, N);
        slides += (logit > 0) == (tumour[b] > 0);
        for (int n = 0; n < N; n++) patches += (score[n] > 0) == (n < tumour[b]);
    }
    if (status == MIL_OK) printf("after 15 epochs: accuracy %.2f on slides, %.2f on patches that no label was given for\n", slides / (double)BAGS, patches / (double)(BAGS * N));

    float streamed = 0;                                   // the last slide once more
    mil_scorer_reset(scorer);
    if (status == MIL_OK) status = mil_scorer_push(scorer, features[BAGS - 1][0], 4, 0, MIL_F32);
    if (status == MIL_OK) status = mil_scorer_push(scorer, features[BAGS - 1][4], N - 4, 0, MIL_F32);
    if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_LOGITS, &streamed, 1);
    if (status == MIL_OK) printf("streamed in two pushes: %s logit\n", streamed == logit ? "the same" : "another");
    else fprintf(stderr, "%s\n", mil_error(ctx));

    mil_scorer_free(scorer);
    mil_trainer_free(trainer);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK;
}
