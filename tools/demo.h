// `mil demo`: a synthetic cohort from start to heatmap, with the commands that a user would give.
#ifndef TOOL_DEMO_H
#define TOOL_DEMO_H
#include "apply.h"
#include "cohort.h"
#include "linear.h"

TOOL_FN double mean_of(const double *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    return n ? sum / (double)n : (double)NAN;
}

// 95% bootstrap interval of a mean.
TOOL_FN mil_status mean_metric(mil_context *ctx, void *user, const int64_t *indices, int64_t n, double *value)
{
    double sum = 0;
    (void)ctx;
    for (int64_t i = 0; i < n; i++) sum += ((const double *)user)[indices[i]];
    *value = sum / (double)n;
    return MIL_OK;
}

// How well values [n], at stride `columns`, order the instances with label 1 before those with 0; NaN when one kind is absent.
TOOL_FN double instance_auroc(mil_context *ctx, const double *values, int64_t columns, const mil_tensor *labels, int64_t n)
{
    double *x = TOOL_NEW(double, n), value;
    int64_t *y = TOOL_NEW(int64_t, n);
    for (int64_t i = 0; i < n; i++) {
        x[i] = values[i * columns];
        y[i] = tensor_value(labels, i) > 0;
    }
    tool_check(ctx, mil_metric_auroc(ctx, x, y, n, &value));
    free(x);
    free(y);
    return value;
}

// The linear baseline on the same splits: predictions of the test bags.
TOOL_FN predictions linear_splits(const data_set *d, const splits *s, const double *means, double l2)
{
    predictions all = { NULL, 0, 1 };
    for (int64_t k = 0; k < s->count; k++) {
        const split *p = &s->at[k];
        int64_t *both = TOOL_NEW(int64_t, p->train_count + p->val_count);
        memcpy(both, p->train, (size_t)p->train_count * sizeof *both);             // it needs no validation bags, so it trains on them
        memcpy(both + p->train_count, p->val, (size_t)p->val_count * sizeof *both);
        linear m = linear_fit(means, d->dim, both, p->train_count + p->val_count, d, l2);
        for (int64_t i = 0; i < p->test_count; i++) {
            const double z = linear_logit(&m, means + p->test[i] * d->dim);
            predictions_add(&all, p->test[i], k, d->bag[p->test[i]].label, "test", &z, 1);
        }
        linear_free(&m);
        free(both);
    }
    return all;
}

TOOL_FN void print_interval(mil_context *ctx, const predictions *p, const data_set *d, const char *name)
{
    double *x = TOOL_NEW(double, p->count * d->class_count);
    int64_t *labels = TOOL_NEW(int64_t, p->count);
    mil_interval v[MIL_METRIC_COUNT];
    const int64_t n = predictions_collect(p, -1, "test", 0, d->class_count, x, labels);
    tool_check(ctx, mil_metrics_bootstrap(ctx, x, labels, n, d->class_count, NULL, v));
    printf("  %-32s %.3f [%.3f, %.3f]    %.3f [%.3f, %.3f]\n", name, v[MIL_METRIC_AUROC].value, v[MIL_METRIC_AUROC].low, v[MIL_METRIC_AUROC].high,
           v[MIL_METRIC_ACCURACY].value, v[MIL_METRIC_ACCURACY].low, v[MIL_METRIC_ACCURACY].high);
    free(x);
    free(labels);
}

TOOL_FN void picture_paste(picture *to, const picture *from, int64_t x, int64_t y)
{
    for (int64_t r = 0; r < from->height; r++) memcpy(to->rgba + ((y + r) * to->width + x) * 4, from->rgba + r * from->width * 4, (size_t)from->width * 4);
}

// The true regions: tumour red, other tissue grey.
TOOL_FN picture truth_picture(const open_bag *b, const grid *g, int64_t zoom)
{
    picture p = picture_make(g->columns * zoom, g->rows * zoom);
    for (int64_t i = 0; i < b->instances; i++) {
        const int64_t x = g->cell[i] % g->columns * zoom, y = g->cell[i] / g->columns * zoom;
        picture_box(&p, x, y, x + zoom, y + zoom, tensor_value(&b->labels, i) > 0 ? 0xb2182bff : 0xd0d0d0ff);
    }
    return p;
}

// Runs one of the tool's own commands, and shows it as a user would type it.
TOOL_FN int demo_command(mil_context *ctx, const command *commands, const char *line)
{
    char *copy = tool_string(line), *words[64];
    int count = 0;
    printf("\n$ build/mil %s\n", line);
    fflush(stdout);
    for (char *w = strtok(copy, " "); w && count < 64; w = strtok(NULL, " ")) words[count++] = w;
    const command *c = commands;
    while (strcmp(c->name, words[0]) != 0) c++;
    arguments a = arguments_parse(c, count - 1, words + 1);
    const int status = c->run(ctx, &a);
    arguments_free(&a);
    free(copy);
    return status;
}

TOOL_FN int demo(mil_context *ctx, const arguments *a, const command *commands)
{
    const char *folder = a->operands ? a->operand[0] : "build/demo";
    const uint64_t seed = (uint64_t)argument_int(a, "seed", 0, 1000000000);
    const int64_t slides = argument_int(a, "slides", 20, 5000);
    const double started = seconds_now();
    char *data = path_join(folder, "data"), *run = path_join(folder, "run"), *maps = path_join(folder, "heatmaps");
    int64_t patches, tumour;
    if (a->operands > 1) tool_usage("demo: one folder at most");
    if (strchr(folder, ' ')) tool_usage("demo: a folder without blanks in its name, please");
    make_folder(data);
    printf("Making %lld synthetic slides in %s: tissue, small tumour regions, three scanners ...\n", (long long)slides, data);
    fflush(stdout);
    cohort_write(ctx, data, slides, seed, &patches, &tumour);
    printf("%lld patches of %d features, %.1f%% of them tumour.\n", (long long)patches, COHORT_DIM, 100.0 * (double)tumour / (double)patches);

    if (argument_given(a, "data-only")) {
        free(data); free(run); free(maps);
        return 0;
    }

    // 1. train
    make_folder(maps);
    char *line = tool_format("train --data %s --model abmil --set embed_dim=64 --set attn_dim=32 --folds 5 --epochs 25 --lr 5e-4 --val 0.15 --out %s --overwrite --quiet --seed %llu",
                             data, run, (unsigned long long)seed);
    demo_command(ctx, commands, line);
    free(line);

    // 2. where the model looks and what it finds there, on slides that its fold did not see
    data_set d = data_open(ctx, data, NULL, NULL, NULL, 0);
    splits s = splits_make(&d, "5", 0, 0.15, 0, seed);
    double *attention = TOOL_NEW(double, d.count), *contribution = TOOL_NEW(double, d.count);
    predictions model_predictions = { NULL, 0, 2 };
    int64_t n = 0, shown = 0;
    const double *means = bag_means(&d);
    for (int64_t k = 0; k < s.count; k++) {
        char *leaf = tool_format("fold_%lld/best.safetensors", (long long)k), *weights = path_join(run, leaf);
        mil_model *model = weights_open(ctx, weights, NULL, "");
        mil_scorer *scorer = instance_scorer(model);
        for (int64_t i = 0; i < s.at[k].test_count; i++) {
            const int64_t bag = s.at[k].test[i];
            open_bag b = data_bag(&d, bag, NULL);
            instance_scores x = score_instances(ctx, scorer, &b, 2, d.bag[bag].name);
            predictions_add(&model_predictions, bag, k, d.bag[bag].label, "test", x.logits, 1);
            const double of_attention = instance_auroc(ctx, x.score, 1, &b.labels, b.instances), of_contribution = instance_auroc(ctx, x.margin + 1, 2, &b.labels, b.instances);
            if (!isnan(of_attention)) {
                attention[n] = of_attention;
                contribution[n++] = of_contribution;
            }
            if (!isnan(of_attention) && shown < 4 && i % 3 == 0) {                 // a picture: truth, attention, contribution
                grid g = grid_make(&b, d.bag[bag].path, 0, 0);
                const int64_t zoom = 8, gap = 12, width = g.columns * zoom;
                double low, high;
                picture parts[3];
                parts[0] = truth_picture(&b, &g, zoom);
                parts[1] = grid_picture(&g, x.rank, 1, b.instances, zoom, 0, &low, &high);
                parts[2] = grid_picture(&g, x.margin + 1, 2, b.instances, zoom, 1, &low, &high);
                picture panel = picture_make(3 * width + 2 * gap, g.rows * zoom);
                for (int part = 0; part < 3; part++) {
                    picture_paste(&panel, &parts[part], part * (width + gap), 0);
                    if (part == 0) {
                        char *name = tool_format("%s/%s_truth.png", maps, d.bag[bag].name);
                        picture_write(ctx, name, &parts[0]);
                        free(name);
                    }
                    picture_free(&parts[part]);
                }
                char *name = tool_format("%s/%s_panel.png", maps, d.bag[bag].name);
                picture_write(ctx, name, &panel);
                free(name);
                picture_free(&panel);
                grid_free(&g);
                line = tool_format("heatmap --weights %s --out %s/%s.png --geojson %s", weights, maps, d.bag[bag].name, d.bag[bag].path);
                demo_command(ctx, commands, line);
                free(line);
                shown++;
            }
            instance_scores_free(&x);
            bag_close(&b);
        }
        mil_scorer_free(scorer);
        mil_model_free(model);
        free(leaf);
        free(weights);
    }
    predictions linear_predictions = linear_splits(&d, &s, means, 10);
    mil_interval of_attention, of_contribution;
    tool_check(ctx, mil_bootstrap(ctx, mean_metric, attention, NULL, n, 0, NULL, &of_attention));
    tool_check(ctx, mil_bootstrap(ctx, mean_metric, contribution, NULL, n, 0, NULL, &of_contribution));
    printf("\nSlides, each tested by the fold that did not see it      AUROC                   accuracy\n");
    print_interval(ctx, &model_predictions, &d, "abmil");
    print_interval(ctx, &linear_predictions, &d, "linear model on mean features");
    printf("\nTumour patches within %lld unseen tumour slides, mean AUROC per slide:\n", (long long)n);
    printf("  attention                        %.3f [%.3f, %.3f]    where the model looked\n", of_attention.value, of_attention.low, of_attention.high);
    printf("  contribution to the logits       %.3f [%.3f, %.3f]    what it found there\n", of_contribution.value, of_contribution.low, of_contribution.high);
    printf("\nPictures in %s: *_truth.png, the contribution map beside it (.png with .json and .geojson), and *_panel.png\n"
           "(truth, attention rank, contribution). %.0f seconds in all.\n", maps, seconds_now() - started);
    printf("\nYour own slides, one .safetensors or .npy per slide and a labels.csv with `bag,label`, in one folder:\n\n"
           "    build/mil train --data YOUR_FOLDER --model abmil --folds 5 --out YOUR_RUN\n");
    predictions_free(&model_predictions);
    predictions_free(&linear_predictions);
    splits_free(&s);
    data_free(&d);
    free((void *)(uintptr_t)means);
    free(attention); free(contribution);
    free(data); free(run); free(maps);
    return 0;
}
#endif
