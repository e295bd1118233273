// Predictions of many bags: what they are worth, on the terminal, as CSV and as JSON.
#ifndef TOOL_REPORT_H
#define TOOL_REPORT_H
#include "fit.h"

typedef struct prediction {
    int64_t bag, fold, label;                              // fold -1: no folds
    const char *split;                                     // train, val, test, or new
    double *logits;                                        // [C]
    double temperature;                                    // of the model that made it
} prediction;

typedef struct predictions { prediction *at; int64_t count, logits; } predictions;

TOOL_FN void predictions_add(predictions *p, int64_t bag, int64_t fold, int64_t label, const char *split, const double *logits, double temperature)
{
    p->at = (prediction *)tool_grow(p->at, (size_t)p->count + 1, sizeof *p->at);
    prediction *q = &p->at[p->count++];
    q->bag = bag;
    q->fold = fold;
    q->label = label;
    q->split = split;
    q->temperature = temperature;
    q->logits = TOOL_NEW(double, p->logits);
    memcpy(q->logits, logits, (size_t)p->logits * sizeof *logits);
}

TOOL_FN void predictions_free(predictions *p)
{
    for (int64_t k = 0; k < p->count; k++) free(p->at[k].logits);
    free(p->at);
    memset(p, 0, sizeof *p);
}

// Probabilities [n, classes] of those with a label and the given fold and split (-1, NULL: all). Returns n.
TOOL_FN int64_t predictions_collect(const predictions *p, int64_t fold, const char *split, int calibrated, int64_t classes, double *probabilities, int64_t *labels)
{
    int64_t n = 0;
    for (int64_t k = 0; k < p->count; k++) {
        const prediction *q = &p->at[k];
        if (q->label < 0 || (fold >= 0 && q->fold != fold) || (split && strcmp(q->split, split) != 0)) continue;
        class_probabilities(q->logits, p->logits, calibrated ? q->temperature : 1, -1, probabilities + n * classes);
        labels[n++] = q->label;
    }
    return n;
}

TOOL_FN int64_t most_probable(const double *p, int64_t classes)
{
    int64_t best = 0;
    for (int64_t c = 1; c < classes; c++) if (p[c] > p[best]) best = c;
    return best;
}

TOOL_FN void predictions_write(mil_context *ctx, const char *path, const predictions *p, const data_set *d)
{
    text t = { NULL, 0, 0 };
    double *x = TOOL_NEW(double, d->class_count);
    text_add(&t, "bag,split,fold,label,predicted");
    for (int64_t c = 0; c < d->class_count; c++) {
        char *head = tool_format("probability_%s", d->class_name[c]);
        text_put(&t, ",", 1);
        text_field(&t, head);
        free(head);
    }
    for (int64_t c = 0; c < p->logits; c++) text_add(&t, p->logits > 1 ? ",logit_%lld" : ",logit", (long long)c);
    text_put(&t, "\n", 1);
    for (int64_t k = 0; k < p->count; k++) {
        const prediction *q = &p->at[k];
        class_probabilities(q->logits, p->logits, 1, -1, x);
        text_field(&t, d->bag[q->bag].name);
        text_add(&t, ",%s,", q->split);
        if (q->fold >= 0) text_add(&t, "%lld", (long long)q->fold);
        text_put(&t, ",", 1);
        if (q->label >= 0) text_field(&t, d->class_name[q->label]);
        text_put(&t, ",", 1);
        text_field(&t, d->class_name[most_probable(x, d->class_count)]);
        for (int64_t c = 0; c < d->class_count; c++) text_add(&t, ",%.6f", x[c]);
        for (int64_t c = 0; c < p->logits; c++) text_add(&t, ",%.9g", q->logits[c]);
        text_put(&t, "\n", 1);
    }
    file_write(ctx, path, &t);
    text_free(&t);
    free(x);
}

// Prints a table of metrics with bootstrap intervals, calibration before and after the temperature, and the confusion matrix.
// Adds the same to `out` as members of a JSON object. who: what these bags are ("test bags", ...). out may be NULL.
TOOL_FN void report(mil_context *ctx, const predictions *p, const data_set *d, const char *split, const char *who, int64_t resamples, uint64_t seed, text *out)
{
    static const mil_metric shown[] = { MIL_METRIC_AUROC, MIL_METRIC_ACCURACY, MIL_METRIC_BALANCED_ACCURACY, MIL_METRIC_F1_MACRO, MIL_METRIC_AVERAGE_PRECISION,
        MIL_METRIC_SENSITIVITY, MIL_METRIC_SPECIFICITY, MIL_METRIC_KAPPA, MIL_METRIC_KAPPA_QUADRATIC };
    static const mil_metric calibration[] = { MIL_METRIC_BRIER, MIL_METRIC_ECE, MIL_METRIC_LOG_LOSS };
    const int64_t C = d->class_count;
    double *x = TOOL_NEW(double, p->count * C), *scaled = TOOL_NEW(double, p->count * C);
    int64_t *labels = TOOL_NEW(int64_t, p->count), *predicted = TOOL_NEW(int64_t, p->count), *confusion = TOOL_NEW(int64_t, C * C);
    mil_interval intervals[MIL_METRIC_COUNT];
    mil_metrics after;
    mil_bootstrap_options options = mil_bootstrap_default();
    const int64_t n = predictions_collect(p, -1, split, 0, C, x, labels);
    if (n == 0) {
        printf("no labelled %s\n", who);
        goto done;
    }
    predictions_collect(p, -1, split, 1, C, scaled, labels);
    options.resamples = resamples;
    options.seed = seed;
    tool_check(ctx, mil_metrics_bootstrap(ctx, x, labels, n, C, &options, intervals));
    tool_check(ctx, mil_metrics_compute(ctx, scaled, labels, n, C, &after));
    int64_t folds = 0;
    for (int64_t k = 0; k < p->count; k++) if (p->at[k].fold >= folds) folds = p->at[k].fold + 1;
    double *fold_value = TOOL_NEW(double, (folds + 1) * MIL_METRIC_COUNT);
    for (int64_t f = 0; f < folds; f++) {
        mil_metrics m;
        const int64_t in_fold = predictions_collect(p, f, split, 0, C, scaled, predicted);
        for (int k = 0; k < MIL_METRIC_COUNT; k++) fold_value[f * MIL_METRIC_COUNT + k] = (double)NAN;
        if (!in_fold) continue;
        tool_check(ctx, mil_metrics_compute(ctx, scaled, predicted, in_fold, C, &m));
        for (int k = 0; k < MIL_METRIC_COUNT; k++) fold_value[f * MIL_METRIC_COUNT + k] = mil_metric_value(&m, (mil_metric)k);
    }
    printf("\n%lld %s, %d%% intervals from %lld bootstrap resamples%s\n", (long long)n, who, 95, (long long)resamples, folds > 1 ? "; mean and deviation over folds" : "");
    for (size_t k = 0; k < sizeof shown / sizeof *shown; k++) {
        const mil_interval *v = &intervals[shown[k]];
        if (isnan(v->value) || (C > 2 && (shown[k] == MIL_METRIC_SENSITIVITY || shown[k] == MIL_METRIC_SPECIFICITY)) || (C == 2 && shown[k] == MIL_METRIC_KAPPA_QUADRATIC)) continue;
        printf("  %-18s %.3f  [%.3f, %.3f]", mil_metric_name(shown[k]), v->value, v->low, v->high);
        if (folds > 1) {
            double sum = 0, square = 0, count = 0;
            for (int64_t f = 0; f < folds; f++) {
                const double y = fold_value[f * MIL_METRIC_COUNT + shown[k]];
                if (isnan(y)) continue;
                sum += y;
                square += y * y;
                count++;
            }
            if (count > 1) printf("   %.3f +- %.3f", sum / count, sqrt(fabs(square / count - sum * sum / count / count) * count / (count - 1)));
        }
        putchar('\n');
    }
    puts("  calibration, raw -> at the temperature fitted on validation bags:");
    for (size_t k = 0; k < sizeof calibration / sizeof *calibration; k++) {
        const mil_interval *v = &intervals[calibration[k]];
        printf("  %-18s %.3f  [%.3f, %.3f] -> %.3f\n", mil_metric_name(calibration[k]), v->value, v->low, v->high, mil_metric_value(&after, calibration[k]));
    }
    tool_check(ctx, mil_metric_predict(ctx, x, n, C, predicted));
    tool_check(ctx, mil_metric_confusion(ctx, predicted, labels, n, C, confusion));
    puts("  confusion (rows: truth, columns: prediction):");
    printf("  %-16s", "");
    for (int64_t c = 0; c < C; c++) printf(" %9.9s", d->class_name[c]);
    putchar('\n');
    for (int64_t r = 0; r < C; r++) {
        printf("  %-16.16s", d->class_name[r]);
        for (int64_t c = 0; c < C; c++) printf(" %9lld", (long long)confusion[r * C + c]);
        putchar('\n');
    }
    if (out) {
        text_add(out, "\"bags\":%lld,\"resamples\":%lld,\"metrics\":{", (long long)n, (long long)resamples);
        for (int k = 0; k < MIL_METRIC_COUNT; k++) {
            const mil_interval *v = &intervals[k];
            text_add(out, "%s\n  \"%s\":{\"value\":", k ? "," : "", mil_metric_name((mil_metric)k));
            text_number(out, v->value, 9);
            text_add(out, ",\"low\":");
            text_number(out, v->low, 9);
            text_add(out, ",\"high\":");
            text_number(out, v->high, 9);
            if (folds > 1) {
                text_add(out, ",\"folds\":[");
                for (int64_t f = 0; f < folds; f++) {
                    if (f) text_put(out, ",", 1);
                    text_number(out, fold_value[f * MIL_METRIC_COUNT + k], 9);
                }
                text_put(out, "]", 1);
            }
            text_put(out, "}", 1);
        }
        text_add(out, "\n},\"calibrated\":{");
        for (size_t k = 0; k < sizeof calibration / sizeof *calibration; k++) {
            text_add(out, "%s\"%s\":", k ? "," : "", mil_metric_name(calibration[k]));
            text_number(out, mil_metric_value(&after, calibration[k]), 9);
        }
        text_add(out, "},\n\"classes\":[");
        for (int64_t c = 0; c < C; c++) {
            if (c) text_put(out, ",", 1);
            text_json(out, d->class_name[c]);
        }
        text_add(out, "],\"confusion\":[");
        for (int64_t r = 0; r < C; r++) {
            text_add(out, "%s[", r ? "," : "");
            for (int64_t c = 0; c < C; c++) text_add(out, "%s%lld", c ? "," : "", (long long)confusion[r * C + c]);
            text_put(out, "]", 1);
        }
        text_put(out, "]", 1);
    }
    free(fold_value);
done:
    free(x); free(scaled); free(labels); free(predicted); free(confusion);
}
#endif
