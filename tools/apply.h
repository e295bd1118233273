// `mil train`, `eval`, `score`, `heatmap`.
#ifndef TOOL_APPLY_H
#define TOOL_APPLY_H
#include "command.h"
#include "heatmap.h"
#include "run.h"

// ---- train -------------------------------------------------------------------------------------------------------
TOOL_FN char *argument_join(const arguments *a, const char *name)            // "k=v k=v" of an option that may be repeated
{
    text t = { NULL, 0, 0 };
    text_put(&t, "", 0);
    for (int i = 0; i < a->count; i++) {
        if (strcmp(a->name[i], name) != 0) continue;
        if (!strchr(a->value[i], '=')) tool_usage("%s: option --%s %s: key=value is needed", a->command->name, name, a->value[i]);
        text_add(&t, "%s%s", t.size ? " " : "", a->value[i]);
    }
    return t.data;
}

TOOL_FN data_columns argument_columns(const arguments *a)
{
    const data_columns c = { argument(a, "labels"), argument(a, "bag-column"), argument(a, "label-column"), argument(a, "split-column"), argument(a, "group-column") };
    return c;
}

TOOL_FN void config_text(text *t, const char *key, const char *value)
{
    text_json(t, key);
    text_put(t, ": ", 2);
    if (value) text_json(t, value);
    else text_put(t, "null", 4);
    text_put(t, ",\n", 2);
}

TOOL_FN uint64_t data_hash(const data_set *d)              // what the bags are called, hold and are labelled
{
    uint64_t h = 14695981039346656037u;
    for (int64_t i = 0; i < d->count; i++) {
        const data_entry *b = &d->bag[i];
        const int64_t numbers[3] = { b->label, b->count, d->folds ? d->folds[i] : -1 };
        const char *const words[3] = { b->name, b->group ? b->group : "", b->split ? b->split : "" };
        h = hash_bytes(h, numbers, sizeof numbers);
        for (int k = 0; k < 3; k++) h = hash_bytes(h, words[k], strlen(words[k]) + 1);
    }
    return h;
}

// Stops when the run in the folder was asked for otherwise: going on would mix two experiments.
TOOL_FN void config_compare(mil_context *ctx, const char *path, const char *folder, const text *config)
{
    const char *fault;
    json *old = json_open(ctx, path), *now = json_parse(config->data, config->size, &fault);
    for (const json *j = now->child; j; j = j->next) {
        const json *o = json_get(old, j->key);
        if (o && o->type == j->type && (!j->value || strcmp(o->value, j->value) == 0)) continue;
        tool_fail("%s: the run there has %s %s, now it is %s; use another --out, or --overwrite", folder, j->key, o && o->value ? o->value : "(none)",
                  j->value ? j->value : "(none)");
    }
    json_free(old);
    json_free(now);
}

TOOL_FN void remove_run(const char *folder)
{
    static const char *const files[] = { "config.json", "splits.csv", "state.safetensors", "best.safetensors", "last.safetensors", "log.csv",
                                         "predictions.csv", "metrics.json", NULL };
    for (int k = -1; k < 1000; k++) {
        char *leaf = tool_format("fold_%d", k), *place = k < 0 ? tool_string(folder) : path_join(folder, leaf);
        const int there = is_folder(place);
        for (int i = 0; there && files[i]; i++) {
            char *path = path_join(place, files[i]);
            if (remove(path) != 0 && errno != ENOENT) tool_fail("%s: %s", path, strerror(errno));
            free(path);
        }
        if (k >= 0 && there) rmdir(place);
        free(leaf);
        free(place);
        if (!there && k >= 0) break;
    }
}

TOOL_FN int run_train(mil_context *ctx, const arguments *a)
{
    const char *folder = argument_needed(a, "out"), *data_path = argument_needed(a, "data"), *folds = argument(a, "folds");
    recipe r;
    text config = { NULL, 0, 0 }, optim = { NULL, 0, 0 }, metrics = { NULL, 0, 0 };
    memset(&r, 0, sizeof r);
    if (a->operands) tool_usage("train: '%s' is no option (mil train --help)", a->operand[0]);
    r.model = argument_needed(a, "model");
    r.set = argument_join(a, "set");
    r.epochs = argument_int(a, "epochs", 1, 1000000);
    r.patience = argument_int(a, "patience", 0, 1000000);
    r.monitor = argument(a, "monitor");
    r.balanced = strcmp(argument_choice(a, "sampling", "shuffle|balanced"), "balanced") == 0;
    r.standardize = argument_given(a, "standardize");
    r.label_smoothing = argument_real(a, "label-smoothing", 0, 0.99);
    r.save_every = argument_real(a, "save-every", 0, 1e6);
    r.seed = (uint64_t)argument_int(a, "seed", 0, INT64_MAX);
    if (strcmp(r.monitor, "loss") != 0 && mil_metric_find(r.monitor) == MIL_METRIC_COUNT) {
        const char *best = NULL;
        int distance = 1000;
        for (int k = 0; k < MIL_METRIC_COUNT; k++) name_nearer(r.monitor, mil_metric_name((mil_metric)k), &best, &distance);
        tool_usage("train: option --monitor %s: no such metric; did you mean %s?", r.monitor, best);
    }
    text_add(&optim, "optimizer=%s lr=%s weight_decay=%s schedule=%s", argument(a, "optimizer"), argument(a, "lr"), argument(a, "weight-decay"), argument(a, "schedule"));
    char *more = argument_join(a, "optim");
    if (more[0]) text_add(&optim, " %s", more);
    r.optim = optim.data;
    const double val = argument_real(a, "val", 0, 0.5), test = argument_real(a, "test", 0, 0.5);
    const int64_t repeat = argument_int(a, "repeat", 0, 1000), bootstrap = argument_int(a, "bootstrap", 2, 1000000);
    const data_columns columns = argument_columns(a);
    data_set d = data_open(ctx, data_path, argument(a, "features"), &columns, NULL, 0);
    if (d.class_count == 1) recipe_check(ctx, &r, &d);     // says so before a split of one class fails
    splits s = splits_make(&d, folds, repeat, val, test, r.seed);

    text_add(&config, "{\n");
    config_text(&config, "format", "mil-run/1");
    config_text(&config, "data", data_path);
    config_text(&config, "model", r.model);
    config_text(&config, "set", r.set);
    config_text(&config, "optim", r.optim);
    config_text(&config, "monitor", r.monitor);
    config_text(&config, "sampling", argument(a, "sampling"));
    config_text(&config, "folds", folds);
    config_text(&config, "features", argument(a, "features"));
    text_add(&config, "\"epochs\": %lld,\n\"patience\": %lld,\n\"standardize\": %s,\n\"label_smoothing\": %.17g,\n", (long long)r.epochs, (long long)r.patience,
             r.standardize ? "true" : "false", r.label_smoothing);
    text_add(&config, "\"seed\": %llu,\n\"val\": %.17g,\n\"test\": %.17g,\n\"repeat\": %lld,\n", (unsigned long long)r.seed, val, test, (long long)repeat);
    text_add(&config, "\"fold_count\": %lld,\n\"bags\": %lld,\n\"dim\": %lld,\n\"data_hash\": \"%016llx\"\n}\n", s.folds ? (long long)s.count : 0LL,
             (long long)d.count, (long long)d.dim, (unsigned long long)data_hash(&d));
    recipe_check(ctx, &r, &d);
    make_folder(folder);
    remove_leftovers(folder);
    char *config_path = path_join(folder, "config.json"), *splits_path = path_join(folder, "splits.csv");
    if (argument_given(a, "overwrite")) remove_run(folder);
    if (path_exists(folder, "config.json")) config_compare(ctx, config_path, folder, &config);
    else if (argument_given(a, "resume")) tool_fail("%s: no run to go on with", folder);
    splits_write(ctx, splits_path, &s, &d);
    file_write(ctx, config_path, &config);

    printf("%s: %lld bags, %lld features, %lld classes:", data_path, (long long)d.count, (long long)d.dim, (long long)d.class_count);
    int64_t total = 0, tests = 0;
    for (int64_t c = 0; c < d.class_count; c++) {
        int64_t n = 0;
        for (int64_t i = 0; i < d.count; i++) n += d.bag[i].label == c;
        printf("%s %s %lld", c ? "," : "", d.class_name[c], (long long)n);
    }
    for (int64_t k = 0; k < s.count; k++) {
        total += s.at[k].train_count * r.epochs;
        tests += s.at[k].test_count;
    }
    if (s.folds) printf("; %lld folds\n", (long long)s.count);
    else printf("; train %lld, val %lld, test %lld\n", (long long)s.at[0].train_count, (long long)s.at[0].val_count, (long long)s.at[0].test_count);
    fflush(stdout);
    progress p = progress_start(total, "bags");
    p.quiet = argument_given(a, "quiet");
    predictions all = run_splits(ctx, &d, &r, &s, folder, &p, NULL, NULL);

    char *path = path_join(folder, "predictions.csv");
    predictions_write(ctx, path, &all, &d);
    free(path);
    const char *part = tests ? "test" : s.at[0].val_count ? "val" : NULL;
    text_add(&metrics, "{\"part\":");
    text_json(&metrics, part ? part : "none");
    if (part) {
        text_put(&metrics, ",", 1);
        if (!tests) puts("\nno test bags: these are the validation bags, which chose the epoch, so the figures are too good");
        report(ctx, &all, &d, part, tests ? s.folds ? "bags, each tested by the fold that did not see it" : "test bags" : "validation bags",
               bootstrap, r.seed, &metrics);
    } else puts("\nno test and no validation bags: nothing to measure");
    text_add(&metrics, "}\n");
    path = path_join(folder, "metrics.json");
    file_write(ctx, path, &metrics);
    printf("\nwritten to %s: %sbest.safetensors, predictions.csv, metrics.json, log.csv\n", folder, s.folds ? "fold_*/" : "");
    free(path);
    free(config_path);
    free(splits_path);
    free(more);
    free((void *)(uintptr_t)r.set);
    text_free(&config);
    text_free(&optim);
    text_free(&metrics);
    predictions_free(&all);
    splits_free(&s);
    data_free(&d);
    return 0;
}

// ---- models from files -------------------------------------------------------------------------------------------
// The model that a weights file describes; name given: that model with these weights.
TOOL_FN mil_model *weights_open(mil_context *ctx, const char *path, const char *name, const char *set)
{
    mil_model *model = NULL;
    if (!name && set[0]) tool_usage("option --set %s: it needs --model NAME; weights without it say themselves what they are", set);
    if (!name) {
        model = mil_open(ctx, path);
        if (!model) tool_fail("%s%s", mil_error(ctx), strstr(mil_error(ctx), "which model") == NULL ? "" : " (--model NAME --set k=v says what it is)");
        return model;
    }
    model = mil_create(ctx, name, set);
    if (!model) tool_option_fault(ctx);
    tool_check(ctx, mil_load(model, path));
    return model;
}

TOOL_FN char **operand_bags(const arguments *a, int64_t *count)              // files; a folder stands for all bags in it
{
    char **paths = NULL;
    *count = 0;
    for (int i = 0; i < a->operands; i++) {
        int64_t n = 1;
        char **names = is_folder(a->operand[i]) ? list_bags(a->operand[i], &n) : NULL;
        paths = (char **)tool_grow(paths, (size_t)(*count + n), sizeof *paths);
        if (n == 0) tool_fail("%s: no .safetensors or .npy files in it", a->operand[i]);
        for (int64_t k = 0; k < n; k++) {
            paths[(*count)++] = names ? path_join(a->operand[i], names[k]) : tool_string(a->operand[i]);
            if (names) free(names[k]);
        }
        free(names);
    }
    if (*count == 0) tool_usage("%s: a FILE is needed (mil %s --help)", a->command->name, a->command->name);
    return paths;
}

// Results in a folder are named after the bags: two of one name would overwrite each other.
TOOL_FN void stems_check(char *const *paths, int64_t count, const char *folder)
{
    char **stems = TOOL_NEW(char *, count);
    for (int64_t i = 0; i < count; i++) stems[i] = path_stem(paths[i]);
    if (count) qsort(stems, (size_t)count, sizeof *stems, compare_names);
    for (int64_t i = 1; i < count; i++) {
        if (strcmp(stems[i], stems[i - 1]) != 0) continue;
        char *first = NULL, *second = NULL;
        for (int64_t k = 0; k < count && !second; k++) {
            char *stem = path_stem(paths[k]);
            if (strcmp(stem, stems[i]) == 0) *(first ? &second : &first) = paths[k];
            free(stem);
        }
        tool_fail("%s and %s would both be '%s' in %s", first, second, stems[i], folder);
    }
    for (int64_t i = 0; i < count; i++) free(stems[i]);
    free(stems);
}

TOOL_FN open_bag bag_for(mil_context *ctx, const char *path, const char *features, const mil_model *model, const described *about)
{
    open_bag b = bag_open(ctx, path, features);
    if (b.instances && b.dim != mil_model_in_dim(model))
        tool_fail("%s: features have width %lld, the model takes %lld", path, (long long)b.dim, (long long)mil_model_in_dim(model));
    bag_scale(&b, &about->scale);
    return b;
}

// ---- eval --------------------------------------------------------------------------------------------------------
TOOL_FN const char *split_of(const table *t, const char *bag, const char *fold)
{
    for (int64_t r = 1; t && r < t->rows; r++) if (strcmp(t->row[r][0], bag) == 0 && strcmp(t->row[r][1], fold) == 0) return t->row[r][2];
    return NULL;
}

TOOL_FN int run_eval(mil_context *ctx, const arguments *a)
{
    const char *run = argument_needed(a, "run"), *data_path = argument_needed(a, "data"), *wanted = argument_choice(a, "split", "test|val|train|new|all");
    char *path = path_join(run, "config.json"), **classes = NULL;
    predictions all = { NULL, 0, 0 };
    data_set d;
    text out = { NULL, 0, 0 };
    if (a->operands) tool_usage("eval: '%s' is no option (mil eval --help)", a->operand[0]);
    const int64_t bootstrap = argument_int(a, "bootstrap", 2, 1000000), seed = argument_int(a, "seed", 0, INT64_MAX);
    if (!is_folder(run)) tool_fail("%s: no such run", run);
    json *config = json_open(ctx, path);
    if (strcmp(json_text(config, "format", ""), "mil-run/1") != 0) tool_fail("%s: not the config of a run", path);
    const double fold_count = json_number(config, "fold_count", 0);
    if (!(fold_count >= 0 && fold_count <= 1e6)) tool_fail("%s: fold_count is %g", path, fold_count);
    const int64_t folds = (int64_t)fold_count;
    free(path);
    path = path_join(run, "splits.csv");
    table t = table_open(ctx, path);
    if (t.columns < 3) tool_fail("%s: not the splits of a run", path);
    for (int64_t r = 1; r < t.rows; r++)
        if (strcmp(t.row[r][2], "train") != 0 && strcmp(t.row[r][2], "val") != 0 && strcmp(t.row[r][2], "test") != 0)
            tool_fail("%s: line %lld: split '%s' is none of train, val, test", path, (long long)t.line[r], t.row[r][2]);
    free(path);
    memset(&d, 0, sizeof d);
    double *sum = NULL;
    int64_t *sums = NULL, C = 0, left_out = 0, empty = 0;
    for (int64_t k = 0; k < (folds ? folds : 1); k++) {
        char *leaf = folds ? tool_format("fold_%lld/best.safetensors", (long long)k) : tool_string("best.safetensors"), *fold = tool_format("%lld", (long long)k);
        char *weights = path_join(run, leaf);
        mil_model *model = weights_open(ctx, weights, NULL, "");
        described about = model_described(model, weights);
        if (k == 0) {
            const data_columns columns = argument_columns(a);
            d = data_open(ctx, data_path, argument(a, "features") ? argument(a, "features") : json_text(config, "features", NULL) && json_get(config, "features")->type == 's'
                          ? json_text(config, "features", NULL) : NULL, &columns, about.classes, about.class_count);
            C = all.logits = mil_model_num_classes(model);
            sum = TOOL_NEW(double, d.count * C);
            sums = TOOL_NEW(int64_t, d.count);
        }
        if (d.dim != mil_model_in_dim(model)) tool_fail("%s: features have width %lld, the model takes %lld", data_path, (long long)d.dim, (long long)mil_model_in_dim(model));
        double *logits = TOOL_NEW(double, C);
        for (int64_t i = 0; i < d.count; i++) {
            int known = 0;
            const char *role = split_of(&t, d.bag[i].name, fold);
            for (int64_t r = 1; !role && r < t.rows && !known; r++) known = strcmp(t.row[r][0], d.bag[i].name) == 0;
            if (!role && known) continue;
            if (d.bag[i].count == 0) { empty += k == 0; continue; }
            const int is_new = !role;
            if (strcmp(wanted, "all") != 0 && strcmp(role ? role : "new", wanted) != 0 && !(is_new && strcmp(wanted, "test") == 0)) continue;
            predict(ctx, model, &d, &i, 1, &about.scale, logits, NULL, "");
            if (!is_new) {
                predictions_add(&all, i, folds ? k : -1, d.bag[i].label, strcmp(role, "test") == 0 ? "test" : strcmp(role, "val") == 0 ? "val" : "train", logits, about.temperature);
                sums[i] = -1;
                continue;
            }
            sums[i]++;
            for (int64_t c = 0; c < C; c++) sum[i * C + c] += logits[c];
            if (k + 1 < (folds ? folds : 1)) continue;
            for (int64_t c = 0; c < C; c++) sum[i * C + c] /= (double)sums[i];
            predictions_add(&all, i, -1, d.bag[i].label, "new", sum + i * C, about.temperature);
        }
        free(logits);
        described_free(&about);
        mil_model_free(model);
        free(weights);
        free(leaf);
        free(fold);
    }
    for (int64_t i = 0; i < d.count; i++) left_out += sums[i] == 0 && d.bag[i].count > 0;
    int64_t fresh = 0, seen = 0;
    for (int64_t k = 0; k < all.count; k++) fresh += strcmp(all.at[k].split, "new") == 0, seen += strcmp(all.at[k].split, "train") == 0;
    printf("%s: %lld bags", data_path, (long long)d.count);
    if (fresh) printf(", %lld new to the run%s", (long long)fresh, folds ? " (mean logits of all folds)" : "");
    if (left_out) printf(", %lld of other parts left out (--split says which to take)", (long long)left_out);
    if (empty) printf(", %lld empty", (long long)empty);
    putchar('\n');
    if (seen) tool_warn("%lld of the bags were trained on: the figures are too good", (long long)seen);
    if (all.count == 0) tool_fail("%s: no bag of it is a %s bag of %s; --split all takes every one", data_path, wanted, run);
    text_add(&out, "{\"part\":\"%s\",", wanted);
    report(ctx, &all, &d, NULL, "bags", bootstrap, (uint64_t)seed, &out);
    text_add(&out, "}\n");
    if (argument(a, "json")) file_write(ctx, argument(a, "json"), &out);
    if (argument(a, "predictions")) predictions_write(ctx, argument(a, "predictions"), &all, &d);
    text_free(&out);
    free(sum);
    free(sums);
    free(classes);
    predictions_free(&all);
    json_free(config);
    table_free(&t);
    data_free(&d);
    return 0;
}

// ---- score -------------------------------------------------------------------------------------------------------
TOOL_FN int run_score(mil_context *ctx, const arguments *a)
{
    const char *weights = argument_needed(a, "weights"), *attention = argument(a, "attention"), *out_path = argument(a, "out");
    const int json_lines = strcmp(argument_choice(a, "format", "csv|jsonl"), "jsonl") == 0;
    char *set = argument_join(a, "set");
    int64_t count;
    char **paths = operand_bags(a, &count);
    mil_model *model = weights_open(ctx, weights, argument(a, "model"), set);
    described about = model_described(model, weights);
    const int64_t C = mil_model_num_classes(model);
    const double temperature = argument_given(a, "calibrated") ? about.temperature : 1;
    double *p = TOOL_NEW(double, about.class_count);
    mil_scorer_options options = mil_scorer_options_default();
    options.results = 0;
    mil_scorer *scorer = attention ? instance_scorer(model) : mil_scorer_create(model, &options);
    if (!scorer) tool_fail("%s", mil_error(ctx));
    if (attention) stems_check(paths, count, attention);
    if (attention) make_folder(attention);
    text line = { NULL, 0, 0 };
    if (out_path) tool_check(ctx, mil_writer_create(ctx, out_path, &tool_outer_writer));
    mil_writer *writer = tool_outer_writer;
    if (!json_lines) {
        text_add(&line, "bag,instances,predicted");
        for (int64_t c = 0; c < about.class_count; c++) {
            char *head = tool_format("probability_%s", about.classes[c]);
            text_put(&line, ",", 1);
            text_field(&line, head);
            free(head);
        }
        for (int64_t c = 0; c < C; c++) text_add(&line, C > 1 ? ",logit_%lld" : ",logit", (long long)c);
        text_put(&line, "\n", 1);
    }
    for (int64_t i = 0; i < count; i++) {
        tool_stop_if_asked();
        open_bag b = bag_for(ctx, paths[i], argument(a, "features"), model, &about);
        char *stem = path_stem(paths[i]);
        double *logits = NULL;
        if (b.instances == 0) {
            tool_warn("%s: no instances (a slide without tissue?), so no score", paths[i]);
        } else if (attention) {
            instance_scores s = score_instances(ctx, scorer, &b, C, paths[i]);
            char *leaf = tool_format("%s.csv", stem), *path = path_join(attention, leaf);
            if (!s.score && !s.weight && !s.contribution) tool_fail("%s: %s gives no attention", weights, mil_model_name(model));
            instances_write(ctx, path, &b, &s, about.classes, about.class_count);
            logits = TOOL_NEW(double, C);
            memcpy(logits, s.logits, (size_t)C * sizeof *logits);
            instance_scores_free(&s);
            free(leaf);
            free(path);
        } else {
            mil_real *raw = TOOL_NEW(mil_real, C);
            if (mil_scorer_score(scorer, &b.bag) != MIL_OK || mil_scorer_read(scorer, MIL_LOGITS, raw, C) != MIL_OK) tool_fail("%s: %s", paths[i], mil_error(ctx));
            logits = TOOL_NEW(double, C);
            for (int64_t c = 0; c < C; c++) logits[c] = (double)raw[c];
            free(raw);
        }
        if (logits) class_probabilities(logits, C, temperature, -1, p);
        if (json_lines) {
            text_add(&line, "{\"bag\":");
            text_json(&line, stem);
            text_add(&line, ",\"instances\":%lld", (long long)b.instances);
            if (logits) {
                text_add(&line, ",\"predicted\":");
                text_json(&line, about.classes[most_probable(p, about.class_count)]);
                text_add(&line, ",\"probabilities\":{");
                for (int64_t c = 0; c < about.class_count; c++) {
                    if (c) text_put(&line, ",", 1);
                    text_json(&line, about.classes[c]);
                    text_put(&line, ":", 1);
                    text_number(&line, p[c], 6);
                }
                text_add(&line, "},\"logits\":[");
                for (int64_t c = 0; c < C; c++) {
                    if (c) text_put(&line, ",", 1);
                    text_number(&line, logits[c], 9);
                }
                text_put(&line, "]", 1);
            }
            text_put(&line, "}\n", 2);
        } else {
            text_field(&line, stem);
            text_add(&line, ",%lld,", (long long)b.instances);
            if (logits) text_field(&line, about.classes[most_probable(p, about.class_count)]);
            for (int64_t c = 0; c < about.class_count; c++) if (logits) text_add(&line, ",%.6f", p[c]); else text_put(&line, ",", 1);
            for (int64_t c = 0; c < C; c++) if (logits) text_add(&line, ",%.9g", logits[c]); else text_put(&line, ",", 1);
            text_put(&line, "\n", 1);
        }
        if (writer) tool_check(ctx, mil_writer_put(writer, line.data, line.size));
        else fwrite(line.data, 1, line.size, stdout);
        text_free(&line);
        free(logits);
        free(stem);
        bag_close(&b);
        free(paths[i]);
    }
    if (writer) {
        tool_check(ctx, mil_writer_commit(writer));
        mil_writer_free(writer);
        tool_outer_writer = NULL;
    }
    mil_scorer_free(scorer);
    described_free(&about);
    mil_model_free(model);
    free(paths);
    free(set);
    free(p);
    return 0;
}

// ---- heatmap -----------------------------------------------------------------------------------------------------
TOOL_FN void legend_write(mil_context *ctx, const char *path, const char *bag, const grid *g, const map_choice *m, const char *klass, int64_t zoom,
                          int diverging, double low, double high, const instance_scores *s, const double *p, char *const *classes, int64_t class_count)
{
    text t = { NULL, 0, 0 };
    text_add(&t, "{\"bag\":");
    text_json(&t, bag);
    text_add(&t, ",\n\"level0\":{\"x\":%.9g,\"y\":%.9g,\"width\":%.9g,\"height\":%.9g},\n\"step\":[%.9g,%.9g],\"step_from\":", g->x0, g->y0,
             (double)g->columns * g->step_x, (double)g->rows * g->step_y, g->step_x, g->step_y);
    text_json(&t, g->step_from);
    text_add(&t, ",\n\"patch_edge\":%.9g,\"patch_edge_from\":", g->edge);
    text_json(&t, g->edge_from);
    text_add(&t, ",\n\"pixels_per_step\":%lld,\"columns\":%lld,\"rows\":%lld,\"patches\":%lld,\"patches_off_grid\":%lld,\"patches_sharing_a_cell\":%lld,\n",
             (long long)zoom, (long long)g->columns, (long long)g->rows, (long long)s->instances, (long long)g->off, (long long)g->shared);
    text_add(&t, "\"map\":\"%s\"", m->map);
    if (diverging) {
        text_add(&t, ",\"class\":");
        text_json(&t, klass);
    } else text_add(&t, ",\"head\":%lld", (long long)m->head);
    text_add(&t, ",\"meaning\":\"%s\",\n\"colours\":\"%s\",\"low\":", strcmp(m->map, "contribution") == 0 ? "exact summand of the class's logit"
             : strcmp(m->map, "margin") == 0 ? "summand of the class's logit less the mean of the other classes' summands"
             : strcmp(m->map, "rank") == 0 ? "rank of the attention score, 0 the lowest patch, 1 the highest"
             : strcmp(m->map, "weight") == 0 ? "attention after the softmax, sums to 1 over the patches" : "attention before the softmax",
             diverging ? "blue against, white 0, red for; 2% of the cells lie outside low..high" : "dark low, bright high");
    text_number(&t, low, 6);
    text_add(&t, ",\"high\":");
    text_number(&t, high, 6);
    text_add(&t, ",\n\"probabilities\":{");
    for (int64_t c = 0; c < class_count; c++) {
        if (c) text_put(&t, ",", 1);
        text_json(&t, classes[c]);
        text_put(&t, ":", 1);
        text_number(&t, p[c], 6);
    }
    text_add(&t, "}}\n");
    file_write(ctx, path, &t);
    text_free(&t);
}

TOOL_FN int run_heatmap(mil_context *ctx, const arguments *a)
{
    const char *weights = argument_needed(a, "weights"), *out = argument_needed(a, "out"), *klass = argument(a, "class"), *map = argument_choice(a, "map", "contribution|margin|rank|weight|score");
    const double edge = argument_real(a, "patch-size", 0, 1e6), step = argument_real(a, "step", 0, 1e6);
    double dx = 0, dy = 0;
    const char *offset = argument(a, "offset");
    char *set = argument_join(a, "set");
    int64_t count, zoom_wanted = argument_int(a, "zoom", 0, 256);
    if (offset) {
        char rest;
        if (sscanf(offset, "%lf,%lf%c", &dx, &dy, &rest) != 2 || !(fabs(dx) < 1e9) || !(fabs(dy) < 1e9)) tool_usage("heatmap: option --offset %s: X,Y is needed", offset);
    }
    char **paths = operand_bags(a, &count);
    mil_model *model = weights_open(ctx, weights, argument(a, "model"), set);
    described about = model_described(model, weights);
    const int64_t C = mil_model_num_classes(model);
    map_choice choice = { map, -1, argument_int(a, "head", 0, 1000) };
    if (klass) {
        const char *best = NULL;
        int distance = 1000;
        for (int64_t c = 0; c < about.class_count; c++) {
            name_nearer(klass, about.classes[c], &best, &distance);
            if (strcmp(about.classes[c], klass) == 0) choice.klass = c;
        }
        if (choice.klass < 0) tool_usage("heatmap: the model has no class '%s'; did you mean '%s'?", klass, best);
        if (C == 1 && choice.klass == 0) tool_usage("heatmap: the model's one logit is for class '%s'; blue is against it", about.classes[1]);
    }
    mil_scorer *scorer = instance_scorer(model);
    const int to_file = has_ending(out, ".png");
    if (to_file && count > 1) tool_usage("heatmap: --out %s is one picture, and there are %lld bags; name a folder", out, (long long)count);
    if (!to_file) stems_check(paths, count, out);
    if (!to_file) make_folder(out);
    for (int64_t i = 0; i < count; i++) {
        tool_stop_if_asked();
        open_bag b = bag_for(ctx, paths[i], argument(a, "features"), model, &about);
        char *stem = path_stem(paths[i]), *leaf = tool_format("%s.png", stem);
        char *base = to_file ? tool_copy(out, strlen(out) - 4) : path_join(out, stem), *png = to_file ? tool_string(out) : tool_format("%s.png", base);
        if (b.instances == 0) {
            tool_warn("%s: no instances (a slide without tissue?), so no heatmap", paths[i]);
        } else {
            grid g = grid_make(&b, paths[i], edge, step);
            instance_scores s = score_instances(ctx, scorer, &b, C, paths[i]);
            double *p = TOOL_NEW(double, about.class_count), low, high;
            class_probabilities(s.logits, C, 1, -1, p);
            map_choice m = choice;
            int64_t columns;
            int diverging;
            if (m.klass < 0) m.klass = about.class_count == 2 ? 1 : most_probable(p, about.class_count);
            if (!m.map) {
                m.map = s.contribution ? "contribution" : "rank";
                if (!s.contribution && i == 0) tool_warn("%s gives no contributions: the map is the rank of its attention", mil_model_name(model));
            }
            if (!argument_given(a, "head") && s.heads == about.class_count) m.head = m.klass;      // a map per class
            const double *values = map_values(&s, &m, paths[i], &columns, &diverging);
            int64_t zoom = zoom_wanted;
            if (!zoom) {
                const int64_t longer = g.columns > g.rows ? g.columns : g.rows;
                zoom = longer < 600 ? 600 / longer : 1;
                if (zoom > 32) zoom = 32;
            }
            if ((double)g.columns * (double)zoom > 65535 || (double)g.rows * (double)zoom > 65535 || (double)(g.columns * g.rows) * (double)(zoom * zoom) > 3e8)
                tool_fail("%s: %lld x %lld steps at %lld pixels each make too large a picture; use a smaller --zoom", paths[i], (long long)g.columns,
                          (long long)g.rows, (long long)zoom);
            picture image = grid_picture(&g, values, columns, b.instances, zoom, diverging, &low, &high);
            picture_write(ctx, png, &image);
            picture_free(&image);
            char *path = tool_format("%s.json", base);
            legend_write(ctx, path, stem, &g, &m, about.classes[m.klass], zoom, diverging, low, high, &s, p, about.classes, about.class_count);
            free(path);
            if (argument_given(a, "geojson")) {
                path = tool_format("%s.geojson", base);
                geojson_write(ctx, path, &b, &g, &s, about.classes, about.class_count, dx, dy);
                free(path);
            }
            printf("%s: %s%s%s, %.4g..%.4g, probability of %s %.3f\n", png, m.map, diverging ? " to " : "", diverging ? about.classes[m.klass] : "", low, high,
                   about.classes[m.klass], p[m.klass]);
            free(p);
            instance_scores_free(&s);
            grid_free(&g);
        }
        bag_close(&b);
        free(stem); free(leaf); free(base); free(png); free(paths[i]);
    }
    mil_scorer_free(scorer);
    described_free(&about);
    mil_model_free(model);
    free(paths);
    free(set);
    return 0;
}
#endif
