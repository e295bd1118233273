// Which models respect the MIL assumption, that a bag is positive because of instances that are in it? The unit tests of Raff and
// Holt (NeurIPS 2023): a model is trained on bags with a shortcut that the assumption forbids, and tested on bags where the shortcut
// misleads (unit_bags.h). It fails where its AUROC on those is below chance. Beside it stands the AUROC on bags that are new but
// made as in training: what a usual test set would report.
//
//     assumption FOLDER [MODEL...]      FOLDER: where the bags are written; MODEL: as in `mil models`, else all
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MIL_IMPLEMENTATION
#include "mil.h"
#include <sys/wait.h>
#include "compare.h"
#include "unit_bags.h"

enum { BAGS = 500, D = 16, EPOCHS = 10, SEEDS = 2 };

// A packed set of three times BAGS bags: to train on, new ones of the same process, and misleading ones.
enum { TRAINING, SAME, MISLEADING, PARTS };
static void write_bags(mil_context *ctx, const char *folder, unit_kind kind, uint64_t seed)
{
    unit_bags u[PARTS];
    int64_t rows = 0, bags = PARTS * BAGS, row = 0;
    make_folder(folder);
    for (int part = 0; part < PARTS; part++) {
        unit_draws draws = { seed + (uint64_t)part, 0, NULL, NULL };
        u[part] = unit_make(kind, D, BAGS, 10, 0.5, part != MISLEADING, &draws);
        rows += u[part].rows;
    }
    float *x = TOOL_NEW(float, rows * D);
    int64_t *bag = TOOL_NEW(int64_t, rows), *label = TOOL_NEW(int64_t, bags), *is_test = TOOL_NEW(int64_t, bags);
    for (int part = 0; part < PARTS; part++) {
        for (int64_t i = 0; i < u[part].rows * D; i++) x[row * D + i] = (float)u[part].x[i];
        for (int64_t b = 0; b < BAGS; b++) {
            label[part * BAGS + b] = u[part].y[b];
            is_test[part * BAGS + b] = part != TRAINING;
            for (int64_t k = 0; k < u[part].sizes[b]; k++) bag[row++] = part * BAGS + b;
        }
        unit_free(&u[part]);
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

// The control: a model that cannot break the assumption, since its one logit is the largest of its instances' (the pooling of mi-Net,
// Wang et al. 2018): no further instance lowers it. With a logit per class it could, by a large one of the negative class. Its scorer is
// linear, for a maximum trains badly through hidden layers. A maximum cannot say that two concepts must meet (multi concept), but
// positive bags have more chances for a high score.
typedef struct control_config { int64_t in_dim; } control_config;
static const mil_option control_options[] = { { "in_dim", MIL_OPTION_INT, offsetof(control_config, in_dim), "1024", "1..", "width of an instance" } };
static void control_declare(mil_builder *b, void *model, const void *config)
{
    *(mil_linear_layer *)model = mil_declare_linear(b, ((const control_config *)config)->in_dim, 1, 1, MIL_LINEAR_TORCH, "classifier");
}
static void control_forward(const void *model, const void *config, const mil_inputs *in, mil_outputs *out)
{
    (void)config;
    out->logits = mil_squeeze(mil_max(mil_linear_forward((const mil_linear_layer *)model, in->features), 1), 1);       // [B, 1]
    if (in->target) out->loss = mil_loss_node(out->logits, in->target);
}
static const mil_config control_configs[] = { { "max", "" } };
static const mil_architecture control_architecture = {
    "instance", "largest score of an instance", "Wang et al. 2018", "", control_options, 1, sizeof(control_config), control_configs, 1, sizeof(mil_linear_layer),
    "classifier", MIL_MODEL_BATCHES, control_declare, control_forward
};

static int measure(const char *folder, const char *name)
{
    mil_context *ctx = small_context();
    int broken = 0, weak = 0;
    tool_check(ctx, mil_register(ctx, &control_architecture));
    char *set = small_options(ctx, name, 2);
    printf("| `%s` |", name);
    fflush(stdout);
    for (int kind = 0; kind < UNIT_COUNT; kind++) {
        double same = 0, misleading = 0;
        for (uint64_t seed = 0; seed < SEEDS; seed++) {
            char *path = path_join(folder, unit_names[kind]);
            data_set d = data_open(ctx, path, NULL, NULL, NULL, 0);
            splits s = splits_make(&d, NULL, 0, 0, 0, 0);
            const recipe r = { name, set, "optimizer=adam lr=1e-3 weight_decay=1e-5", "loss", EPOCHS, 0, 0, 0, 0, 0, seed };
            predictions p = run_splits(ctx, &d, &r, &s, NULL, NULL, NULL, NULL);
            same += bag_auroc(ctx, &p, SAME * BAGS, (SAME + 1) * BAGS) / SEEDS;
            misleading += bag_auroc(ctx, &p, MISLEADING * BAGS, (MISLEADING + 1) * BAGS) / SEEDS;
            predictions_free(&p);
            splits_free(&s);
            data_free(&d);
            free(path);
        }
        printf(" %.2f, %.2f |", same, misleading);
        if (same < 0.7) weak++;                            // nothing learned: nothing to mislead
        else broken += misleading < 0.5;
    }
    puts(broken ? " no |" : weak ? " where it learned |" : " yes |");
    fflush(stdout);
    free(set);
    mil_context_free(ctx);
    return 0;
}

// In a process of its own: a model that cannot take such bags stops that one only.
static void measure_apart(const char *folder, const char *name)
{
    int status = 0;
    fflush(stdout);
    const pid_t child = fork();
    if (child == 0) exit(measure(folder, name));
    if (child < 0 || waitpid(child, &status, 0) < 0 || status) printf("%s`%s` not measured\n", child < 0 ? "" : "\n", name);
}

int main(int argc, char **argv)
{
    if (argc < 2) tool_usage("assumption: a FOLDER to write the bags to is needed");
    mil_context *ctx = small_context();
    for (int kind = 0; kind < UNIT_COUNT; kind++) {
        char *path = path_join(argv[1], unit_names[kind]);
        write_bags(ctx, path, (unit_kind)kind, 100 + 10 * (uint64_t)kind);
        free(path);
    }
    printf("%d bags to train on, %d of each kind to test, %d epochs, mean of %d seeds. AUROC on new bags as in training, and on misleading ones:\n\n"
           "| model | %s | %s | %s | respects the assumption |\n| --- | --- | --- | --- | --- |\n",
           BAGS, BAGS, EPOCHS, SEEDS, unit_names[0], unit_names[1], unit_names[2]);
    measure_apart(argv[1], "instance.max");
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        for (int c = 0; c < m->config_count; c++) {
            char *name = tool_format("%s.%s", m->name, m->configs[c].name);
            if (model_wanted(m, m->configs[c].name, argc - 2, argv + 2)) measure_apart(argv[1], name);
            free(name);
        }
    }
    mil_context_free(ctx);
    return 0;
}
