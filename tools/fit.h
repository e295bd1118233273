// Training one model on one split: epochs of one bag per step, validation, the best weights, and a state file from which a
// killed run goes on with the same bits.
#ifndef TOOL_FIT_H
#define TOOL_FIT_H
#include "data.h"
#include "progress.h"

typedef struct recipe {
    const char *model, *set, *optim;                       // name; "key=value ..." of the model and of the trainer
    const char *monitor;                                   // "loss" or a metric: what chooses the best epoch
    int64_t     epochs, patience;                          // patience 0: no early stopping
    int         balanced, standardize;                     // balanced: every class is drawn as often
    double      label_smoothing;
    double      save_every;                                // seconds from one saved state to the next
    uint64_t    seed;
} recipe;

typedef struct blob { char *data; size_t size; } blob;

typedef struct fit {
    mil_context    *ctx;
    const data_set *data;
    const recipe   *recipe;
    const int64_t  *train, *val;                           // bags, by number
    int64_t         train_count, val_count;
    const char     *folder, *name;                         // folder NULL: nothing is written; name: shown with the progress
    mil_model      *model;                                 // after fit_run: the best weights
    scaling         scale;
    int64_t         logits;                                // C of the model: 1, or the number of classes
    int64_t         epoch, best_epoch;                     // finished epochs; 1-based epoch of the best
    double          best_value, temperature;
    text            log;
    blob            best;
} fit;

// ---- models for data ----
TOOL_FN int has_option(const mil_architecture *m, const char *name)
{
    for (int k = 0; k < m->option_count; k++) if (strcmp(m->options[k].name, name) == 0) return 1;
    return 0;
}

// A name or an option from the command line that the library does not take is a fault of usage.
TOOL_FN TOOL_NORETURN void tool_option_fault(mil_context *ctx)
{
    const mil_status status = mil_error_status(ctx);
    if (status == MIL_ERROR_NO_MEMORY || status == MIL_ERROR_UNSUPPORTED) tool_fail("%s", mil_error(ctx));
    tool_usage("%s", mil_error(ctx));
}

// The model for features of width dim and so many classes, under whatever names the reference gives these two.
TOOL_FN mil_model *model_for(mil_context *ctx, const char *name, const char *set, int64_t dim, int64_t classes)
{
    static const char *const widths[] = { "in_dim", "input_dim", "in_features", NULL };
    static const char *const counts[] = { "num_classes", "n_classes", NULL };
    text options = { NULL, 0, 0 };
    mil_model *model = mil_create(ctx, name, NULL);
    if (!model) tool_option_fault(ctx);
    const mil_architecture *m = mil_model_architecture(model);
    text_put(&options, "", 0);
    for (int k = 0; widths[k]; k++) if (has_option(m, widths[k])) text_add(&options, "%s=%lld ", widths[k], (long long)dim);
    for (int k = 0; counts[k]; k++) if (has_option(m, counts[k])) text_add(&options, "%s=%lld ", counts[k], (long long)classes);
    text_add(&options, "%s", set ? set : "");
    mil_model_free(model);
    model = mil_create(ctx, name, options.data);
    if (!model) tool_option_fault(ctx);
    text_free(&options);
    return model;
}

TOOL_FN blob model_blob(mil_model *model)
{
    blob b = { NULL, 0 };
    mil_context *ctx = mil_model_context(model);
    tool_check(ctx, mil_save_memory(model, NULL, &b.size));
    b.data = TOOL_NEW(char, b.size);
    tool_check(ctx, mil_save_memory(model, b.data, &b.size));
    return b;
}

TOOL_FN void model_restore(mil_model *model, const void *data, size_t size)
{
    tool_check(mil_model_context(model), mil_load_memory(model, data, size, NULL));
}

// What a weights file must carry so that it scores alone: classes, standardisation, temperature.
TOOL_FN void model_describe(mil_model *model, char *const *classes, int64_t class_count, const scaling *s, double temperature)
{
    mil_context *ctx = mil_model_context(model);
    text t = { NULL, 0, 0 };
    text_put(&t, "[", 1);
    for (int64_t c = 0; c < class_count; c++) {
        if (c) text_put(&t, ",", 1);
        text_json(&t, classes[c]);
    }
    text_put(&t, "]", 1);
    tool_check(ctx, mil_model_set_metadata(model, "tool.classes", t.data));
    if (mil_model_num_classes(model) == class_count) tool_check(ctx, mil_model_set_class_names(model, (const char *const *)classes, class_count));
    if (s && s->mean) {
        text_free(&t);
        for (int64_t d = 0; d < s->dim; d++) text_add(&t, "%s%.9g,%.9g", d ? "," : "", (double)s->mean[d], (double)s->factor[d]);
        tool_check(ctx, mil_model_set_metadata(model, "tool.standardize", t.data));
    }
    text_free(&t);
    text_add(&t, "%.17g", temperature);
    tool_check(ctx, mil_model_set_metadata(model, "tool.temperature", t.data));
    text_free(&t);
}

// What model_describe wrote. Without it: classes "0", "1", ...; no standardisation; temperature 1.
typedef struct described { char **classes; int64_t class_count; scaling scale; double temperature; } described;

TOOL_FN described model_described(const mil_model *model, const char *path)
{
    described d;
    const int64_t C = mil_model_num_classes(model), D = mil_model_in_dim(model);
    const char *classes = mil_model_metadata(model, "tool.classes"), *scale = mil_model_metadata(model, "tool.standardize");
    const char *temperature = mil_model_metadata(model, "tool.temperature"), *fault = NULL;
    json *list = classes ? json_parse(classes, strlen(classes), &fault) : NULL;
    memset(&d, 0, sizeof d);
    d.class_count = C == 1 ? 2 : C;
    d.classes = TOOL_NEW(char *, d.class_count);
    const json *item = list && list->type == '[' ? list->child : NULL;
    for (int64_t c = 0; c < d.class_count; c++) {
        const char *name = item && item->type == 's' ? item->value : C > 1 ? mil_model_class_name(model, c) : NULL;
        d.classes[c] = name ? tool_string(name) : tool_format("%lld", (long long)c);
        item = item ? item->next : NULL;
    }
    json_free(list);
    if (scale) {
        d.scale.dim = D;
        d.scale.mean = TOOL_NEW(float, D);
        d.scale.factor = TOOL_NEW(float, D);
        const char *p = scale;
        for (int64_t k = 0; k < 2 * D; k++) {
            char *end;
            const double x = strtod(p, &end);
            if (end == p || (*end != ',' && *end)) tool_fail("%s: metadata tool.standardize: number %lld of %lld is missing", path, (long long)k + 1, (long long)(2 * D));
            (k % 2 ? d.scale.factor : d.scale.mean)[k / 2] = (float)x;
            p = *end ? end + 1 : end;
        }
    }
    d.temperature = 1;
    if (temperature && (!parse_real(temperature, &d.temperature) || d.temperature <= 0)) tool_fail("%s: metadata tool.temperature is '%s'", path, temperature);
    return d;
}

TOOL_FN void described_free(described *d)
{
    for (int64_t c = 0; c < d->class_count; c++) free(d->classes[c]);
    free(d->classes);
    scaling_free(&d->scale);
}

// ---- from logits ----
// Probabilities of `classes` classes from C logits: softmax, or for one logit [1 - sigmoid, sigmoid]. Returns -log p[label].
TOOL_FN double class_probabilities(const double *logits, int64_t C, double temperature, int64_t label, double *p)
{
    double top = -(double)INFINITY, sum = 0;
    if (C == 1) {
        const double z = logits[0] / temperature;
        p[1] = 1 / (1 + exp(-z));
        p[0] = 1 / (1 + exp(z));
        return label < 0 ? 0 : (label ? -z : z) > 30 ? (label ? -z : z) : log1p(exp(label ? -z : z));
    }
    for (int64_t c = 0; c < C; c++) if (logits[c] > top) top = logits[c];
    for (int64_t c = 0; c < C; c++) sum += p[c] = exp((logits[c] - top) / temperature);
    for (int64_t c = 0; c < C; c++) p[c] /= sum;
    return label < 0 ? 0 : log(sum) - (logits[label] - top) / temperature;
}

// Logits [count, C] of bags. A bag that cannot be scored stops the tool, with its name.
TOOL_FN void predict(mil_context *ctx, mil_model *model, const data_set *d, const int64_t *which, int64_t count, const scaling *scale,
                     double *logits, progress *p, const char *what)
{
    const int64_t C = mil_model_num_classes(model);
    mil_scorer_options options = mil_scorer_options_default();
    mil_real *out = TOOL_NEW(mil_real, C);
    options.results = 0;
    mil_scorer *scorer = mil_scorer_create(model, &options);
    if (!scorer) tool_fail("%s", mil_error(ctx));
    for (int64_t k = 0; k < count; k++) {
        open_bag b = data_bag(d, which[k], scale);
        if (mil_scorer_score(scorer, &b.bag) != MIL_OK || mil_scorer_read(scorer, MIL_LOGITS, out, C) != MIL_OK)
            tool_fail("%s: bag '%s': %s", bag_place(d, which[k]), d->bag[which[k]].name, mil_error(ctx));
        for (int64_t c = 0; c < C; c++) logits[k * C + c] = (double)out[c];
        bag_close(&b);
        if (p) progress_add(p, 0, what);
    }
    mil_scorer_free(scorer);
    free(out);
}

// ---- the state of a run ----
// One file holds all of it, replaced atomically after an epoch (every save_every seconds, and the last): weights, best weights, trainer, log, counters. best.safetensors,
// last.safetensors and log.csv are written from it and can be written again.
TOOL_FN char *fit_path(const fit *f, const char *name) { return path_join(f->folder, name); }

TOOL_FN void fit_write_views(fit *f, const blob *last)
{
    char *path = fit_path(f, "last.safetensors");
    tool_check(f->ctx, mil_file_write(f->ctx, path, last->data, last->size));
    free(path);
    path = fit_path(f, "best.safetensors");
    tool_check(f->ctx, mil_file_write(f->ctx, path, f->best.data, f->best.size));
    free(path);
    path = fit_path(f, "log.csv");
    file_write(f->ctx, path, &f->log);
    free(path);
}

TOOL_FN void fit_save(fit *f, const mil_trainer *trainer)
{
    blob last = model_blob(f->model), state = { NULL, 0 };
    tool_check(f->ctx, mil_trainer_save(trainer, NULL, &state.size));
    state.data = TOOL_NEW(char, state.size);
    tool_check(f->ctx, mil_trainer_save(trainer, state.data, &state.size));
    const int64_t sizes[3] = { (int64_t)last.size, (int64_t)f->best.size, (int64_t)state.size };
    const mil_tensor tensors[3] = { mil_tensor_make(last.data, MIL_U8, 1, &sizes[0]), mil_tensor_make(f->best.data, MIL_U8, 1, &sizes[1]),
                                    mil_tensor_make(state.data, MIL_U8, 1, &sizes[2]) };
    const char *const names[3] = { "last", "best", "trainer" };
    char *epoch = tool_format("%lld", (long long)f->epoch), *best_epoch = tool_format("%lld", (long long)f->best_epoch);
    char *best_value = tool_format("%.17g", f->best_value), *temperature = tool_format("%.17g", f->temperature);
    const mil_meta meta[] = { { "format", "mil-state/1" }, { "epoch", epoch }, { "best_epoch", best_epoch }, { "best_value", best_value },
                              { "temperature", temperature }, { "log", f->log.data } };
    char *path = fit_path(f, "state.safetensors");
    tool_check(f->ctx, mil_tensors_write(f->ctx, path, tensors, names, 3, meta, 6));
    fit_write_views(f, &last);
    free(path); free(epoch); free(best_epoch); free(best_value); free(temperature);
    free(last.data); free(state.data);
}

TOOL_FN int blob_tensor(const mil_tensor *t) { return t && t->rank == 1 && t->dtype == MIL_U8; }

// Takes up the state in the folder; 0 when there is none.
TOOL_FN int fit_restore(fit *f, mil_trainer *trainer)
{
    char *path = fit_path(f, "state.safetensors");
    mil_tensors *file;
    if (!path_exists(f->folder, "state.safetensors")) { free(path); return 0; }
    tool_check(f->ctx, mil_tensors_open(f->ctx, path, MIL_FILE_READ, &file));
    const char *format = mil_tensors_meta(file, "format"), *log = mil_tensors_meta(file, "log");
    const mil_tensor *last = mil_tensors_get(file, "last"), *best = mil_tensors_get(file, "best"), *state = mil_tensors_get(file, "trainer");
    const char *epoch = mil_tensors_meta(file, "epoch"), *best_epoch = mil_tensors_meta(file, "best_epoch");
    const char *best_value = mil_tensors_meta(file, "best_value"), *temperature = mil_tensors_meta(file, "temperature");
    if (!format || strcmp(format, "mil-state/1") != 0 || !log || !blob_tensor(last) || !blob_tensor(best) || !blob_tensor(state) || !epoch || !parse_int(epoch, &f->epoch) || !best_epoch ||
        !parse_int(best_epoch, &f->best_epoch) || !best_value || !temperature) tool_fail("%s: not the state of a run", path);
    f->best_value = -(double)INFINITY;                     // a metric that could not be computed is kept as that
    if ((strcmp(best_value, "-inf") != 0 && !parse_real(best_value, &f->best_value)) || !parse_real(temperature, &f->temperature) || f->temperature <= 0 ||
        f->epoch < 0 || f->best_epoch < 0 || f->best_epoch > f->epoch)
        tool_fail("%s: epoch %s, best epoch %s of value %s, temperature %s are not the state of a run", path, epoch, best_epoch, best_value, temperature);
    text_free(&f->log);
    text_put(&f->log, log, strlen(log));
    f->best.size = (size_t)best->shape[0];
    free(f->best.data);
    f->best.data = tool_copy((const char *)best->data, f->best.size);
    model_restore(f->model, last->data, (size_t)last->shape[0]);
    tool_check(f->ctx, mil_trainer_restore(trainer, state->data, (size_t)state->shape[0]));
    const blob weights = { (char *)last->data, (size_t)last->shape[0] };
    fit_write_views(f, &weights);                          // the run may have been killed between the state and these
    mil_tensors_free(file);
    free(path);
    return 1;
}

// ---- an epoch ----
// Which bag is trained at position k of an epoch: a permutation, or draws with every class as likely as the others.
TOOL_FN void fit_order(const fit *f, int64_t epoch, int64_t *order)
{
    const data_set *d = f->data;
    const uint64_t stream = (uint64_t)(2 * epoch + 1000);
    memcpy(order, f->train, (size_t)f->train_count * sizeof *order);
    if (!f->recipe->balanced) {
        random_shuffle(f->recipe->seed, stream, order, f->train_count);
        return;
    }
    // Classes take turns in random order; within a class the bags come in a shuffled round, so that all are used.
    int64_t *member = TOOL_NEW(int64_t, f->train_count), *start = TOOL_NEW(int64_t, d->class_count + 1), *next = TOOL_NEW(int64_t, d->class_count);
    int64_t *turn = TOOL_NEW(int64_t, d->class_count), turns = 0, n = 0;
    for (int64_t c = 0; c < d->class_count; c++) {
        start[c] = n;
        for (int64_t k = 0; k < f->train_count; k++) if (d->bag[f->train[k]].label == c) member[n++] = f->train[k];
        random_shuffle(f->recipe->seed, stream + ((uint64_t)(c + 1) << 32), member + start[c], n - start[c]);
        if (n > start[c]) turn[turns++] = c;
    }
    start[d->class_count] = n;
    for (int64_t k = 0; k < f->train_count; k++) {
        if (k % turns == 0) random_shuffle(f->recipe->seed, stream + ((uint64_t)(k + 1) << 40), turn, turns);
        const int64_t c = turn[k % turns];
        order[k] = member[start[c] + next[c]++ % (start[c + 1] - start[c])];
    }
    free(member); free(start); free(next); free(turn);
}

// A schedule that ends needs the number of steps.
TOOL_FN text trainer_options(const recipe *r, int64_t train_count)
{
    text t = { NULL, 0, 0 };
    text_add(&t, "%s", r->optim ? r->optim : "");
    if (strstr(t.data, "schedule=") && !strstr(t.data, "schedule=constant") && !strstr(t.data, " steps=")) {
        const char *accumulate = strstr(t.data, "accumulate=");
        const long long every = accumulate ? strtoll(accumulate + 11, NULL, 10) : 1;
        text_add(&t, " steps=%lld", (long long)(r->epochs * train_count / (every > 0 ? every : 1)));
    }
    return t;
}

// Stops when this recipe cannot be followed on these data: before anything is written.
TOOL_FN void recipe_check(mil_context *ctx, const recipe *r, const data_set *d)
{
    if (d->class_count < 2)
        tool_fail("%s: at least 2 classes are needed, and all labels are '%s'", d->path, d->class_count ? d->class_name[0] : "");
    mil_model *model = model_for(ctx, r->model, r->set, d->dim, d->class_count);
    const int64_t C = mil_model_num_classes(model);
    if (mil_model_in_dim(model) != d->dim)
        tool_fail("%s: features have width %lld, %s takes %lld", d->path, (long long)d->dim, mil_model_name(model), (long long)mil_model_in_dim(model));
    if (C != d->class_count && !(C == 1 && d->class_count == 2))
        tool_fail("%s: %lld classes, and %s gives %lld logits", d->path, (long long)d->class_count, mil_model_name(model), (long long)C);
    text options = trainer_options(r, 1000);
    mil_trainer *trainer = mil_trainer_create(model, options.data);
    if (!trainer) tool_usage("%s", mil_error(ctx));
    mil_trainer_free(trainer);
    mil_model_free(model);
    text_free(&options);
}

TOOL_FN void fit_run(fit *f, progress *p)
{
    const recipe *r = f->recipe;
    const data_set *d = f->data;
    text options;
    double *logits, *probabilities;
    int64_t *order = TOOL_NEW(int64_t, f->train_count), *labels = TOOL_NEW(int64_t, f->val_count);
    const mil_metric monitor = strcmp(r->monitor, "loss") == 0 ? MIL_METRIC_COUNT : mil_metric_find(r->monitor);
    const double sign = monitor == MIL_METRIC_COUNT ? -1 : mil_metric_sign(monitor);

    if (f->train_count < 1) tool_fail("%s: no bags to train on", d->path);
    f->model = model_for(f->ctx, r->model, r->set, d->dim, d->class_count);
    f->logits = mil_model_num_classes(f->model);
    tool_check(f->ctx, mil_model_init(f->model, r->seed));
    if (r->standardize) f->scale = data_scaling(d, f->train, f->train_count);
    logits = TOOL_NEW(double, f->val_count * f->logits);
    probabilities = TOOL_NEW(double, f->val_count * d->class_count);

    options = trainer_options(r, f->train_count);
    mil_trainer *trainer = mil_trainer_create(f->model, options.data);
    if (!trainer) tool_fail("%s", mil_error(f->ctx));
    mil_trainer_seed(trainer, r->seed);

    for (int64_t k = 0; k < f->val_count; k++) labels[k] = d->bag[f->val[k]].label;

    double saved = seconds_now();
    f->best_value = -(double)INFINITY;
    f->temperature = 1;
    text_add(&f->log, "epoch,rate,train_loss,val_loss,val_accuracy,val_balanced_accuracy,val_auroc,best\n");
    if (f->folder && fit_restore(f, trainer) && p) {
        p->begun += f->epoch * f->train_count;
        progress_add(p, f->epoch * f->train_count, f->name);
        if (f->epoch < r->epochs) progress_say(p, "%s: goes on after epoch %lld", f->name, (long long)f->epoch);
    }
    while (f->epoch < r->epochs && !(r->patience && f->val_count && f->best_epoch && f->epoch - f->best_epoch >= r->patience)) {
        double sum = 0, val_loss = (double)NAN, value;
        const double rate = mil_trainer_lr(trainer);
        mil_metrics metrics;
        fit_order(f, f->epoch, order);
        char *what = tool_format("%s epoch %lld/%lld", f->name, (long long)f->epoch + 1, (long long)r->epochs);
        for (int64_t k = 0; k < f->train_count; k++) {
            const int64_t i = order[k], label = d->bag[i].label;
            open_bag b = data_bag(d, i, &f->scale);
            mil_target target = f->logits == 1 ? mil_target_value((double)label) : mil_target_class(label);
            double loss = 0;
            target.label_smoothing = f->logits == 1 ? 0 : r->label_smoothing;
            if (mil_trainer_step(trainer, &b.bag, &target, &loss, NULL) != MIL_OK) tool_fail("%s: bag '%s': %s", bag_place(d, i), d->bag[i].name, mil_error(f->ctx));
            sum += loss;
            bag_close(&b);
            if (p) progress_add(p, 1, what);
        }
        f->epoch++;
        memset(&metrics, 0, sizeof metrics);
        metrics.accuracy = metrics.balanced_accuracy = metrics.auroc = (double)NAN;
        if (f->val_count) {
            predict(f->ctx, f->model, d, f->val, f->val_count, &f->scale, logits, p, what);
            val_loss = 0;
            for (int64_t k = 0; k < f->val_count; k++)
                val_loss += class_probabilities(logits + k * f->logits, f->logits, 1, labels[k], probabilities + k * d->class_count) / (double)f->val_count;
            tool_check(f->ctx, mil_metrics_compute(f->ctx, probabilities, labels, f->val_count, d->class_count, &metrics));
        }
        value = sign * (monitor == MIL_METRIC_COUNT ? val_loss : mil_metric_value(&metrics, monitor));
        const int better = !f->val_count || f->best_epoch == 0 || value > f->best_value;
        if (better) {
            f->best_epoch = f->epoch;
            f->best_value = isnan(value) ? -(double)INFINITY : value;
            f->temperature = 1;
            if (f->val_count) tool_check(f->ctx, mil_temperature_fit(f->ctx, logits, labels, f->val_count, f->logits, &f->temperature, NULL));
            if (!(f->temperature >= 0.25)) f->temperature = 0.25;      // few bags, all of them right, would have it go to 0
            if (f->temperature > 4) f->temperature = 4;
        }
        text_add(&f->log, "%lld,%.6g,%.6g", (long long)f->epoch, rate, sum / (double)f->train_count);
        const double columns[] = { val_loss, metrics.accuracy, metrics.balanced_accuracy, metrics.auroc };
        for (int k = 0; k < 4; k++) if (isfinite(columns[k])) text_add(&f->log, ",%.6g", columns[k]); else text_put(&f->log, ",", 1);
        text_add(&f->log, ",%d\n", better);
        model_describe(f->model, d->class_name, d->class_count, &f->scale, f->temperature);
        if (better && (f->folder || f->val_count)) {
            free(f->best.data);
            f->best = model_blob(f->model);
        }
        const int last = f->epoch >= r->epochs || (r->patience && f->val_count && f->epoch - f->best_epoch >= r->patience);
        if (f->folder && (last || seconds_now() - saved >= r->save_every)) {
            fit_save(f, trainer);
            saved = seconds_now();
        }
        if (p && !p->quiet) {
            char *line = tool_format("%s  rate %.2e  train loss %.4f", what, rate, sum / (double)f->train_count);
            if (f->val_count) progress_say(p, "%s  val loss %.4f  AUROC %.3f%s", line, val_loss, metrics.auroc, better ? "  *" : "");
            else progress_say(p, "%s", line);
            free(line);
        }
        free(what);
    }
    if (p) {                                               // epochs that early stopping saved
        p->total -= (r->epochs - f->epoch) * f->train_count;
        progress_say(p, "%s: epoch %lld of %lld is the best%s", f->name, (long long)f->best_epoch, (long long)f->epoch,
                     f->val_count ? f->epoch < r->epochs ? " on validation; stopped" : " on validation" : " (the last: no validation)");
    }
    if (f->best.data) model_restore(f->model, f->best.data, f->best.size);
    model_describe(f->model, d->class_name, d->class_count, &f->scale, f->temperature);
    mil_trainer_free(trainer);
    text_free(&options);
    free(order); free(labels); free(logits); free(probabilities);
}

TOOL_FN void fit_free(fit *f)
{
    mil_model_free(f->model);
    scaling_free(&f->scale);
    text_free(&f->log);
    free(f->best.data);
}
#endif
