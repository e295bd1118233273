// Which models respect the MIL assumption, that a bag is positive because of instances that are in it? The unit tests of Raff and
// Holt (NeurIPS 2023): a model is trained on bags with a shortcut that the assumption forbids, and tested on bags where the shortcut
// misleads (unit_bags.h). It fails where its test AUROC is below chance.
//
//     assumption FOLDER [MODEL...]      FOLDER: where the bags are written; MODEL: as in `mil models`, else all
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <sys/wait.h>
#include "run.h"
#include "unit_bags.h"

enum { BAGS = 200, D = 16, EPOCHS = 20 };

// A packed set of BAGS bags to train on and as many to test on.
static void write_bags(mil_context *ctx, const char *folder, unit_kind kind, uint64_t seed)
{
    unit_bags u[2];
    make_folder(folder);
    for (int test = 0; test < 2; test++) {
        unit_draws draws = { seed + (uint64_t)test, 0, NULL, NULL };
        u[test] = unit_make(kind, D, BAGS, 10, 0.5, !test, &draws);
    }
    const int64_t rows = u[0].rows + u[1].rows, bags = 2 * BAGS;
    float *x = TOOL_NEW(float, rows * D);
    int64_t *bag = TOOL_NEW(int64_t, rows), *label = TOOL_NEW(int64_t, bags), *is_test = TOOL_NEW(int64_t, bags), row = 0;
    for (int test = 0; test < 2; test++) {
        for (int64_t i = 0; i < u[test].rows * D; i++) x[row * D + i] = (float)u[test].x[i];
        for (int64_t b = 0; b < BAGS; b++) {
            label[test * BAGS + b] = u[test].y[b];
            is_test[test * BAGS + b] = test;
            for (int64_t k = 0; k < u[test].sizes[b]; k++) bag[row++] = test * BAGS + b;
        }
        unit_free(&u[test]);
    }
    const mil_tensor tensors[] = { mil_tensor_matrix(x, MIL_F32, rows, D), mil_tensor_make(bag, MIL_I64, 1, &rows), mil_tensor_make(label, MIL_I64, 1, &bags),
                                   mil_tensor_make(is_test, MIL_I64, 1, &bags) };
    static const char *const names[] = { "features.npy", "bag.npy", "labels.npy", "test.npy" };
    for (int k = 0; k < 4; k++) {
        char *path = path_join(folder, names[k]);
        tool_check(ctx, mil_npy_write(ctx, path, &tensors[k]));
        free(path);
    }
    free(x); free(bag); free(label); free(is_test);
}

// Small widths, so that all models train in seconds: whichever of these options a model has.
static char *small_options(mil_context *ctx, const char *name)
{
    static const char *const small[][2] = { { "embed_dim", "64" }, { "attn_dim", "32" }, { "att_dim", "32" }, { "inner_dim", "64" }, { "hidden_dim", "64" },
                                            { "k_sample", "2" }, { "feat_ext_sizes", "[64]" }, { "feat_ext_activations", "[relu]" } };
    text t = { NULL, 0, 0 };
    mil_model *model = mil_create(ctx, name, NULL);
    if (!model) tool_fail("%s", mil_error(ctx));
    text_put(&t, "", 0);
    for (size_t k = 0; k < sizeof small / sizeof *small; k++)
        if (has_option(mil_model_architecture(model), small[k][0])) text_add(&t, "%s=%s ", small[k][0], small[k][1]);
    mil_model_free(model);
    return t.data;
}

static double auroc(mil_context *ctx, const predictions *p, int64_t C)
{
    double *x = TOOL_NEW(double, p->count), value;
    int64_t *y = TOOL_NEW(int64_t, p->count);
    for (int64_t k = 0; k < p->count; k++) {
        x[k] = C == 1 ? p->at[k].logits[0] : p->at[k].logits[1] - p->at[k].logits[0];
        y[k] = p->at[k].label;
    }
    tool_check(ctx, mil_metric_auroc(ctx, x, y, p->count, &value));
    free(x);
    free(y);
    return value;
}

// The training bags' AUROC, to see that a model has learned anything.
typedef struct train_auroc { mil_context *ctx; double value; } train_auroc;
static void measure_train(void *user, fit *f, const split *s, int64_t fold)
{
    train_auroc *t = (train_auroc *)user;
    predictions p = { NULL, 0, f->logits };
    double *logits = TOOL_NEW(double, s->train_count * f->logits);
    (void)fold;
    predict(t->ctx, f->model, f->data, s->train, s->train_count, NULL, logits, NULL, "");
    for (int64_t k = 0; k < s->train_count; k++) predictions_add(&p, s->train[k], -1, f->data->bag[s->train[k]].label, "train", logits + k * f->logits, 1);
    t->value = auroc(t->ctx, &p, f->logits);
    predictions_free(&p);
    free(logits);
}

static int measure(const char *folder, const char *name)
{
    mil_context *ctx;
    int broken = 0, weak = 0;
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;
    char *set = small_options(ctx, name);
    printf("%-34s", name);
    fflush(stdout);
    for (int kind = 0; kind < UNIT_COUNT; kind++) {
        double test = 0, train = 0;
        enum { SEEDS = 2 };
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            char *path = path_join(folder, unit_names[kind]);
            data_set d = data_open(ctx, path, NULL, NULL, NULL, 0);
            splits s = splits_make(&d, NULL, 0, 0, 0, 0);
            train_auroc t = { ctx, 0 };
            const recipe r = { name, set, "optimizer=adam lr=1e-3 weight_decay=1e-5", "loss", EPOCHS, 0, 0, 0, 0, 0, seed };
            predictions p = run_splits(ctx, &d, &r, &s, NULL, NULL, measure_train, &t);
            test += auroc(ctx, &p, p.logits) / SEEDS;
            train += t.value / SEEDS;
            predictions_free(&p);
            splits_free(&s);
            data_free(&d);
            free(path);
        }
        printf("  %.2f -> %.2f %s", train, test, test < 0.5 ? "FAILS" : "     ");
        broken += test < 0.5;
        weak += train < 0.8;
    }
    puts(weak ? "   (not learned)" : broken ? "   no" : "   yes");
    free(set);
    mil_context_free(ctx);
    return 0;
}

int main(int argc, char **argv)
{
    mil_context *ctx;
    if (argc < 2) tool_usage("assumption: a FOLDER to write the bags to is needed");
    if (mil_context_create(&ctx, NULL) != MIL_OK) return 1;
    for (int kind = 0; kind < UNIT_COUNT; kind++) {
        char *path = path_join(argv[1], unit_names[kind]);
        write_bags(ctx, path, (unit_kind)kind, 100 + 2 * (uint64_t)kind);
        free(path);
    }
    printf("AUROC on training bags -> on bags where the shortcut misleads (%d bags each, %d epochs, mean of 2 seeds)\n", BAGS, EPOCHS);
    printf("%-34s  %-20s  %-20s  %-20s %s\n", "model", unit_names[0], unit_names[1], unit_names[2], "respects the assumption");
    fflush(stdout);
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        for (int c = 0; c < m->config_count; c++) {
            char *name = tool_format("%s.%s", m->name, m->configs[c].name);
            int wanted = argc < 3, status = 0;
            for (int k = 2; k < argc; k++) wanted |= strcmp(name, argv[k]) == 0 || strcmp(m->name, argv[k]) == 0;
            if (wanted) {
                fflush(stdout);
                const pid_t child = fork();                // a model that cannot take such bags stops its own process only
                if (child == 0) exit(measure(argv[1], name));
                if (child < 0 || waitpid(child, &status, 0) < 0 || status) printf("%s%-34s  not measured\n", child < 0 ? "" : "\n", name);
            }
            free(name);
        }
    }
    mil_context_free(ctx);
    return 0;
}
