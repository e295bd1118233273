// Trains from C: ABMIL learns which slides hold a tumour from slide labels alone, and finds the tumour patches by itself.
//
// A bag is a slide: 20 to 60 patches of 16 features, plain noise. A positive one has two patches that are shifted in four
// of the features; no label ever says which.
//
//     cc -O2 train.c -lm -lpthread && ./a.out
//
// Expected output (within 0.1):
// epoch  1: loss 0.72, test AUROC 0.61
// epoch  5: loss 0.43, test AUROC 0.97
// epoch 10: loss 0.02, test AUROC 1.00
// the patch with most attention is a tumour patch in 1.00 of the positive test slides
// saved and opened again: the same AUROC
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <stdio.h>

enum { D = 16, TRAIN = 100, TEST = 60, BAGS = TRAIN + TEST, MOST = 60 };

static float   features[BAGS][MOST][D];                   // patches of each slide
static int64_t sizes[BAGS], labels[BAGS];
static double  scores[TEST];

static uint32_t state = 1;
static float uniform(void)                                // in 0..1
{
    state = state * 1664525u + 1013904223u;
    return (float)(state >> 8) / (1 << 24);
}

static void make_slides(void)
{
    for (int b = 0; b < BAGS; b++) {
        sizes[b] = 20 + (int64_t)(41 * uniform());
        labels[b] = b % 2;
        for (int n = 0; n < sizes[b]; n++)
            for (int d = 0; d < D; d++)                    // about normal: a sum of three uniforms
                features[b][n][d] = 2 * (uniform() + uniform() + uniform() - 1.5f) + (labels[b] && n < 2 && d < 4 ? 2.5f : 0);
    }
}

// AUROC on the test slides; *found: how often the patch with most attention is one of the two tumour patches.
static mil_status test_model(mil_context *ctx, mil_model *model, double *auroc, double *found)
{
    mil_scorer *scorer = mil_scorer_create(model, NULL);
    float p[2], attention[MOST];
    int hits = 0, positives = 0;
    mil_status status = mil_error_status(ctx);
    for (int b = TRAIN; b < BAGS && status == MIL_OK; b++) {
        const mil_bag bag = mil_bag_make(features[b][0], sizes[b], D);
        status = mil_scorer_score(scorer, &bag);
        if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_PROBABILITIES, p, 2);
        if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_ATTENTION, attention, sizes[b]);
        if (status != MIL_OK) break;
        int top = 0;
        for (int n = 1; n < sizes[b]; n++) if (attention[n] > attention[top]) top = n;
        scores[b - TRAIN] = (double)p[1];
        positives += labels[b] == 1;
        hits += labels[b] == 1 && top < 2;
    }
    mil_scorer_free(scorer);
    if (status == MIL_OK) status = mil_metric_auroc(ctx, scores, labels + TRAIN, TEST, auroc);
    *found = (double)hits / positives;
    return status;
}

int main(void)
{
    mil_context *ctx;
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;
    make_slides();

    mil_model *model = mil_create(ctx, "abmil", "in_dim=16 embed_dim=32 attn_dim=16");
    mil_trainer *trainer = mil_trainer_create(model, "optimizer=adamw lr=0.002 weight_decay=0.0001 accumulate=4 clip_norm=5");
    mil_status status = mil_error_status(ctx);
    double auroc = 0, found = 0, again = 0;

    for (int epoch = 1; epoch <= 10 && status == MIL_OK; epoch++) {
        double sum = 0, loss = 0;
        for (int i = 0; i < TRAIN && status == MIL_OK; i++) {
            const int b = (i * 37 + epoch) % TRAIN;       // another order each time: 37 and TRAIN share no factor
            const mil_bag bag = mil_bag_make(features[b][0], sizes[b], D);
            const mil_target target = mil_target_class(labels[b]);
            status = mil_trainer_step(trainer, &bag, &target, &loss, NULL);
            sum += loss;
        }
        if (status == MIL_OK) status = test_model(ctx, model, &auroc, &found);
        if (status == MIL_OK && (epoch == 1 || epoch % 5 == 0)) printf("epoch %2d: loss %.2f, test AUROC %.2f\n", epoch, sum / TRAIN, auroc);
    }
    mil_trainer_free(trainer);

    if (status == MIL_OK) {
        printf("the patch with most attention is a tumour patch in %.2f of the positive test slides\n", found);
        status = mil_save(model, "tumour.safetensors");
    }
    mil_model *copy = status == MIL_OK ? mil_open(ctx, "tumour.safetensors") : NULL;
    if (copy) status = test_model(ctx, copy, &again, &found);
    if (copy && status == MIL_OK) printf("saved and opened again: %s AUROC\n", again == auroc ? "the same" : "another");
    else fprintf(stderr, "%s\n", mil_error(ctx));

    mil_model_free(copy);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK;
}
