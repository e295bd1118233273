// Scores a slide: weights and patch features from disk, class probabilities and the patches that mattered to the screen.
//
//     cc -O2 score.c -lm -lpthread && ./a.out weights.safetensors slide.npy
//
// A weights file saved by mil_save says itself which model it is for, with which options and class names. Without
// arguments, a small model and a slide of noise are made first, so that there is something to score.
//
// Expected output:
// abmil.base.uni.none: 300 patches of 32 features
//   benign     0.4121
//   malignant  0.5879
// patches with most weight: 26 (0.0074), 260 (0.0067), 18 (0.0062)
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <stdio.h>
#include <stdlib.h>

// What a training run and a patch encoder leave behind.
static mil_status make_files(mil_context *ctx, const char *weights, const char *slide)
{
    static const char *const names[] = { "benign", "malignant" };
    static float features[300][32];
    uint32_t state = 1;
    for (int i = 0; i < 300 * 32; i++) {
        state = state * 1664525u + 1013904223u;
        features[i / 32][i % 32] = (float)(state >> 8) / (1 << 23) - 1;
    }
    const mil_tensor t = mil_tensor_matrix(features, MIL_F32, 300, 32);
    mil_model *model = mil_create(ctx, "abmil", "in_dim=32 embed_dim=16 attn_dim=8");
    if (model && mil_model_set_class_names(model, names, 2) == MIL_OK && mil_save(model, weights) == MIL_OK) mil_npy_write(ctx, slide, &t);
    mil_model_free(model);
    return mil_error_status(ctx);
}

// Scores `features` and prints the answer. An error's sentence stays in the context.
static mil_status score(mil_context *ctx, mil_model *model, const mil_tensor *features)
{
    const int64_t C = mil_model_num_classes(model);
    mil_scorer_options options = mil_scorer_options_default();
    options.results = 1u << MIL_WEIGHTS;                  // beside logits and probabilities, which are always there
    mil_scorer *scorer = mil_scorer_create(model, &options);
    mil_bag bag = mil_bag_make(NULL, 0, 0);
    bag.features = *features;                             // [N, D], any dtype; nothing is copied
    mil_status status = scorer ? mil_scorer_score(scorer, &bag) : mil_error_status(ctx);

    const int64_t N = mil_scorer_instances(scorer);
    float *p = (float *)malloc((size_t)C * sizeof *p), *weight = (float *)malloc((size_t)(N + 1) * sizeof *weight);
    if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_PROBABILITIES, p, C);
    if (status == MIL_OK) status = mil_scorer_read(scorer, MIL_WEIGHTS, weight, N);
    if (status == MIL_OK) {
        printf("%s: %d patches of %d features\n", mil_model_name(model), (int)N, (int)mil_model_in_dim(model));
        for (int64_t c = 0; c < C; c++) printf("  %-10s %.4f\n", mil_model_class_name(model, c) ? mil_model_class_name(model, c) : "?", (double)p[c]);
        printf("patches with most weight:");
        for (int k = 0; k < 3 && k < N; k++) {
            int64_t top = 0;
            for (int64_t n = 1; n < N; n++) if (weight[n] > weight[top]) top = n;
            printf("%s %d (%.4f)", k ? "," : "", (int)top, (double)weight[top]);
            weight[top] = -1;
        }
        puts("");
    }
    free(p);
    free(weight);
    mil_scorer_free(scorer);
    return status;
}

int main(int argc, char **argv)
{
    const char *weights = argc > 2 ? argv[1] : "weights.safetensors", *slide = argc > 2 ? argv[2] : "slide.npy";
    mil_context *ctx;
    mil_model *model = NULL;
    mil_npy *npy = NULL;
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;

    mil_status status = argc > 2 ? MIL_OK : make_files(ctx, weights, slide);
    if (status == MIL_OK) {
        model = mil_open(ctx, weights);
        status = mil_error_status(ctx);
    }
    if (model) status = mil_npy_open(ctx, slide, MIL_FILE_MAP, &npy);
    if (npy) status = score(ctx, model, mil_npy_tensor(npy));
    if (status != MIL_OK) fprintf(stderr, "%s\n", mil_error(ctx));

    mil_npy_free(npy);
    mil_model_free(model);
    mil_context_free(ctx);
    return status != MIL_OK;
}
