// mil: trains, evaluates and applies multiple instance learning models on folders of slide features.
//
//     cc -O2 tools/mil.c -I. -o mil -lm -lpthread
//
// The commands are in the table at the end; each part stands in a header beside this file.
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "text.h"
#include "command.h"
#include "progress.h"
#include "table.h"
#include "data.h"
#include "picture.h"
#include "parity.h"
#include "apply.h"
#include "demo.h"

// ---- models ------------------------------------------------------------------------------------------------------
static const char *option_type_name(mil_option_type type)
{
    static const char *const names[] = { "int", "real", "bool", "choice", "text", "ints", "texts" };
    return names[type];
}

static int same_word(const char *a, const char *b, size_t n) { return strlen(a) == n && memcmp(a, b, n) == 0; }

// One model with one of its configs: options with the values that this config gives them.
static void print_model(mil_context *ctx, const mil_architecture *m, const char *config)
{
    char *name = tool_format("%s.%s", m->name, config);
    mil_model *model = mil_create(ctx, name, NULL);
    tool_check(ctx, model ? MIL_OK : mil_error_status(ctx));
    const int at = printf("%s: ", name);
    print_wrapped(m->title, at, 2, 79);
    print_wrapped(m->citation, 0, 0, 79);
    printf("\n%lld parameters with these options:\n", (long long)mil_model_parameter_count(model));
    for (int k = 0; k < m->option_count; k++) {
        const mil_option *o = &m->options[k];
        const char *value = mil_model_option(model, o->name);
        char *left = tool_format("  %s=%s", o->name, value ? value : o->value);
        char *doc = o->choices && strstr(o->choices, "..") ? tool_string(o->doc)
                  : o->choices ? tool_format("%s (%s)", o->doc, o->choices) : tool_format("%s (%s)", o->doc, option_type_name(o->type));
        printf("%-29s ", left);
        if (strlen(left) > 29) printf("\n%30s", "");
        print_wrapped(doc, 30, 30, 79);
        free(left);
        free(doc);
    }
    mil_model_free(model);
    free(name);
}

static int run_models(mil_context *ctx, const arguments *a)
{
    if (a->operands > 1) tool_usage("models: one name at most");
    if (a->operands == 0) {
        for (int64_t i = 0; i < mil_architecture_count(); i++) {
            const mil_architecture *m = mil_architecture_at(i);
            for (int c = 0; c < (m->config_count ? m->config_count : 1); c++) {
                char *name = tool_format("%s.%s", m->name, m->config_count ? m->configs[c].name : "base");
                printf("%-29s ", name);
                if (strlen(name) > 29) printf("\n%30s", "");
                print_wrapped(m->title, 30, 30, 79);
                free(name);
            }
        }
        puts("\n`mil models NAME` lists a model's options; --set key=value changes one.");
        return 0;
    }
    const char *wanted = a->operand[0], *best = NULL;
    const size_t n = strcspn(wanted, ".");
    char *config = wanted[n] ? tool_copy(wanted + n + 1, strcspn(wanted + n + 1, ".")) : NULL;
    int distance = 1000, found = 0;
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        name_nearer(wanted, m->name, &best, &distance);
        if (!same_word(m->name, wanted, n)) continue;
        for (int c = 0; c < m->config_count; c++) {
            if (config && strcmp(config, m->configs[c].name) != 0) continue;
            if (found++) putchar('\n');
            print_model(ctx, m, m->configs[c].name);
        }
    }
    if (!found) tool_usage("models: no model '%s'; did you mean '%s'?", wanted, best ? best : "");
    free(config);
    return 0;
}

// ---- info --------------------------------------------------------------------------------------------------------
static void print_shape(const mil_tensor *t, const char *dtype, const char *name, int values)
{
    text s = { NULL, 0, 0 };
    text_put(&s, "[", 1);
    for (int k = 0; k < t->rank; k++) text_add(&s, "%s%lld", k ? ", " : "", (long long)t->shape[k]);
    text_put(&s, "]", 1);
    printf("%-5s %-18s %s", dtype, s.data, name);
    text_free(&s);
    if (values && t->data) {
        const int64_t n = mil_tensor_count(t);
        double low = (double)INFINITY, high = -(double)INFINITY, sum = 0;
        int64_t odd = 0;
        for (int64_t i = 0; i < n; i++) {
            const double x = tensor_value(t, i);
            if (!isfinite(x)) { odd++; continue; }
            if (x < low) low = x;
            if (x > high) high = x;
            sum += x;
        }
        if (n > odd) printf("  %g..%g, mean %.4g", low, high, sum / (double)(n - odd));
        if (odd) printf("  %lld not finite", (long long)odd);
    }
    putchar('\n');
}

// A name of a foreign file, whose control characters must not reach the terminal.
static char *printable(const char *s)
{
    char *t = tool_string(s);
    text_printable(t);
    return t;
}

// Element types of safetensors that the library does not read. Others are no types of the format.
static int foreign_dtype(const char *name)
{
    static const char *const names[] = { "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64", "F4", "F6_E2M3", "F6_E3M2" };
    for (size_t k = 0; k < sizeof names / sizeof *names; k++) if (strcmp(name, names[k]) == 0) return 1;
    return 0;
}

static int run_info(mil_context *ctx, const arguments *a)
{
    const int values = argument_given(a, "values");
    if (!a->operands) tool_usage("info: a FILE is needed (mil info --help)");
    for (int i = 0; i < a->operands; i++) {
        const char *path = a->operand[i];
        if (a->operands > 1) printf("%s%s:\n", i ? "\n" : "", path);
        if (has_ending(path, ".npy")) {
            mil_npy *npy;
            tool_check(ctx, mil_npy_open(ctx, path, MIL_FILE_MAP, &npy));
            const mil_tensor *t = mil_npy_tensor(npy);
            int packed = 1;
            for (int k = 0; k < t->rank; k++) packed &= t->stride[k] == 0;
            print_shape(t, mil_dtype_name(t->dtype), packed ? "" : "Fortran order", values);
            if (mil_npy_warning(npy)[0]) printf("%s\n", mil_npy_warning(npy));
            mil_npy_free(npy);
            continue;
        }
        mil_tensors *file;
        tool_check(ctx, mil_tensors_open(ctx, path, MIL_FILE_MAP | MIL_FILE_LIST_ONLY, &file));
        uint64_t bytes = 0, numbers = 0;
        for (int64_t k = 0; k < mil_tensors_count(file); k++) {
            const mil_tensor *t = mil_tensors_at(file, k);
            bytes += mil_tensors_bytes(file, k);
            numbers += mil_tensor_count(t) > 0 ? (uint64_t)mil_tensor_count(t) : 0;
            char *name = printable(mil_tensors_name(file, k)), *dtype = printable(mil_tensors_dtype(file, k));
            print_shape(t, dtype, name, values);
            free(name);
            free(dtype);
        }
        printf("%lld tensors, %llu numbers, %llu bytes\n", (long long)mil_tensors_count(file), (unsigned long long)numbers, (unsigned long long)bytes);
        for (int64_t k = 0; k < mil_tensors_meta_count(file); k++) {
            text line = { NULL, 0, 0 };                    // control characters of a foreign file stay out of the terminal
            const char *value = mil_tensors_meta_value(file, k);
            text_json(&line, value);
            char *key = printable(mil_tensors_meta_key(file, k));
            printf("%s = ", key);
            free(key);
            if (!argument_given(a, "all") && line.size > 200) printf("%.200s... (%zu bytes, --all shows them)\n", line.data, strlen(value));
            else printf("%s\n", line.data);
            text_free(&line);
        }
        for (int64_t k = 0; k < mil_tensors_count(file); k++) {
            const char *dtype = mil_tensors_dtype(file, k);
            if (mil_tensors_at(file, k)->dtype == MIL_DTYPE_COUNT && !foreign_dtype(dtype))
                tool_fail("%s: tensor '%s': '%s' is no dtype of safetensors", path, mil_tensors_name(file, k), dtype);
        }
        mil_tensors_free(file);
    }
    return 0;
}

// ---- check -------------------------------------------------------------------------------------------------------
static int run_check(mil_context *ctx, const arguments *a)
{
    int64_t passed = 0, failed = 0, skipped = 0;
    const double tolerance = argument_real(a, "tolerance", 0, 1);
    char **files = NULL;
    int64_t count = 0;
    if (!a->operands) tool_usage("check: a CASE is needed (mil check --help)");
    for (int i = 0; i < a->operands; i++) {
        if (!is_folder(a->operand[i])) {
            files = (char **)tool_grow(files, (size_t)count + 1, sizeof *files);
            files[count++] = tool_string(a->operand[i]);
            continue;
        }
        int64_t n;
        char **names = list_bags(a->operand[i], &n);
        if (n == 0) tool_fail("%s: no cases in it", a->operand[i]);
        files = (char **)tool_grow(files, (size_t)(count + n), sizeof *files);
        for (int64_t k = 0; k < n; k++) {
            files[count++] = path_join(a->operand[i], names[k]);
            free(names[k]);
        }
        free(names);
    }
    for (int64_t i = 0; i < count; i++) {
        const char result = replay_file(ctx, files[i], tolerance, !argument_given(a, "quiet"));
        passed += result == 'o';
        failed += result == 'F';
        skipped += result == 's';
        free(files[i]);
    }
    free(files);
    printf("%lld passed, %lld failed, %lld skipped\n", (long long)passed, (long long)failed, (long long)skipped);
    return failed || skipped ? 1 : 0;
}

// ---- the table of commands ---------------------------------------------------------------------------------------
#define THREADS \
    { "threads", "N", "0", "threads to use, 0: one per processor; results do not depend on it" }

#define PRECISION \
    { "precision", "HOW", "full", "full, or bf16: features and weights rounded to bfloat16, about twice as fast on CPUs that multiply it, else full" }

static const option models_options[] = { THREADS, { NULL, NULL, NULL, NULL } };
static const option info_options[] = {
    { "values", NULL, NULL, "smallest, largest and mean value of each tensor too" },
    { "all", NULL, NULL, "metadata in full" }, THREADS, { NULL, NULL, NULL, NULL } };
static const option check_options[] = {
    { "tolerance", "X", NULL, "relative tolerance for every tensor, instead of 1e-4, and 1e-3 for gradients" },
    { "quiet", NULL, NULL, "only what failed or was skipped" }, THREADS, { NULL, NULL, NULL, NULL } };

#define DATA_OPTIONS \
    { "features", "NAME", NULL, "tensor to take in .safetensors files; else `features`, `feats`, `embeddings` or `x`" }, \
    { "labels", "FILE", NULL, "table of labels, instead of DATA/labels.csv" }, \
    { "bag-column", "NAME", NULL, "its column of file names; else bag, slide_id, slide, ..." }, \
    { "label-column", "NAME", NULL, "its column of labels; else label, class, target" }, \
    { "split-column", "NAME", NULL, "its column of train, val, test; else split" }, \
    { "group-column", "NAME", NULL, "its column of patients, whose slides stay together; else patient, case_id, group" }
#define WEIGHT_OPTIONS \
    { "weights", "FILE", NULL, "weights, as `mil train` or the model's reference code wrote them" }, \
    { "model", "NAME", NULL, "the model they belong to; not needed for weights of `mil train`" }, \
    { "set", "K=V", NULL, "an option of that model; may be repeated" }, \
    { "features", "NAME", NULL, "tensor to take in .safetensors files" }

static const option train_options[] = {
    { "data", "DIR", NULL, "the bags (see below)" },
    { "model", "NAME", NULL, "a model of `mil models`" },
    { "out", "RUN", NULL, "folder of the run; a run that was stopped there goes on" },
    { "set", "K=V", NULL, "an option of the model; may be repeated" },
    { "folds", "K", NULL, "cross-validates: K stratified folds, patients kept together; or `data` for the data's own" },
    { "repeat", "R", "0", "which of the data's folds, when it has several" },
    { "val", "SHARE", "0.2", "share of the training bags that chooses the epoch; 0: the last epoch is taken" },
    { "test", "SHARE", "0", "share held out for testing, without folds or a split of the data" },
    { "epochs", "N", "30", "passes over the training bags" },
    { "patience", "N", "10", "stops after N epochs without a better one; 0: never" },
    { "monitor", "METRIC", "loss", "what is better: loss, auroc, balanced_accuracy, ..., of the validation bags" },
    { "optimizer", "NAME", "adamw", "sgd, adam, adamw, radam" },
    { "lr", "X", "1e-4", "learning rate" },
    { "weight-decay", "X", "1e-5", "weight decay" },
    { "schedule", "NAME", "cosine", "constant, step, cosine" },
    { "optim", "K=V", NULL, "another option of the optimizer (accumulate, warmup, clip_norm, ema, ...); may be repeated" },
    { "sampling", "HOW", "shuffle", "shuffle, or balanced: every class is drawn as often" },
    { "standardize", NULL, NULL, "features to mean 0 and deviation 1, as on the training bags" },
    { "label-smoothing", "X", "0", "share of the target given to the other classes" },
    { "seed", "N", "0", "of initial weights, dropout, shuffling and splits" },
    { "bootstrap", "N", "1000", "resamples for the intervals" },
    { "save-every", "SECONDS", "5", "state to go on from is saved after the first epoch that ends later than this" },
    { "resume", NULL, NULL, "the run must be there already" },
    { "overwrite", NULL, NULL, "a run that is there is removed first" },
    { "quiet", NULL, NULL, "no line per epoch" },
    DATA_OPTIONS, THREADS, { NULL, NULL, NULL, NULL } };
static const option eval_options[] = {
    { "data", "DIR", NULL, "the bags, as for train" },
    { "run", "RUN", NULL, "folder of a finished run" },
    { "split", "PART", "test", "test (and bags that the run never saw), val, train, new, all" },
    { "json", "FILE", NULL, "the metrics as JSON too" },
    { "predictions", "FILE", NULL, "logits per bag as CSV too" },
    { "bootstrap", "N", "1000", "resamples for the intervals" },
    { "seed", "N", "0", "of the bootstrap" },
    DATA_OPTIONS, PRECISION, THREADS, { NULL, NULL, NULL, NULL } };
static const option score_options[] = {
    WEIGHT_OPTIONS,
    { "format", "HOW", "csv", "csv, or jsonl: a JSON object per line" },
    { "out", "FILE", NULL, "where to; else the terminal" },
    { "calibrated", NULL, NULL, "probabilities at the temperature fitted on validation bags" },
    { "attention", "DIR", NULL, "also a table per bag there: attention score, weight, rank and contribution of each instance" },
    PRECISION, THREADS, { NULL, NULL, NULL, NULL } };
static const option heatmap_options[] = {
    WEIGHT_OPTIONS,
    { "out", "PNG|DIR", NULL, "the picture; or a folder, with a picture per bag" },
    { "map", "WHAT", NULL, "contribution, margin, rank, weight or score; else contribution, or rank where a model has none" },
    { "class", "NAME", NULL, "whose contributions; else the second of two, or the predicted one" },
    { "head", "K", "0", "which attention, for models with several; one per class: that of --class" },
    { "patch-size", "PX", NULL, "edge of a patch at level 0, when the file does not say" },
    { "step", "PX", NULL, "distance of patches at level 0, instead of what the coordinates say" },
    { "zoom", "N", "0", "pixels per step; 0: so that the longer side has about 600" },
    { "geojson", NULL, NULL, "a .geojson of tiles beside the picture, for QuPath" },
    { "offset", "X,Y", NULL, "subtracted from the GeoJSON's coordinates (OpenSlide's bounds-x, bounds-y)" },
    PRECISION, THREADS, { NULL, NULL, NULL, NULL } };

static const option demo_options[] = {
    { "slides", "N", "120", "how many" },
    { "data-only", NULL, NULL, "only makes the cohort, in DIR/data" },
    { "seed", "N", "0", "of the cohort and of the training" }, THREADS, { NULL, NULL, NULL, NULL } };
static int run_demo(mil_context *ctx, const arguments *a);

#define DATA_HELP "DIR holds labels.csv with a column `bag` (a file name, with or without its ending) and a column `label` (any words), and perhaps " \
    "`split` (train, val, test), `fold` (0, 1, ...) and `patient`; the bags are .safetensors files (`features` [N, D], perhaps `coords` [N, 2]) or .npy " \
    "files in DIR or DIR/features. Or it is a packed set: features.npy, bag.npy, labels.npy, perhaps folds.npy and instance_labels.npy."

static const command commands[] = {
    { "models", "[NAME]", "Lists the models; for one, its options with their values, parameter count and source.", NULL, models_options, run_models },
    { "info", "FILE...", "Says what a safetensors or NPY file holds.", NULL, info_options, run_info },
    { "check", "CASE...", "Replays experiments that were run on the models' reference code, and compares every number. A folder stands for all cases in it.",
      "One line per case: `ok NAME err=... (TENSOR)`, `FAIL NAME ...` or `skip NAME: reason`. The exit status is 0 only when none failed or was skipped.",
      check_options, run_check },
    { "train", "--data DIR --model NAME --out RUN [options]", "Trains a model, with validation and early stopping, or cross-validates it; killed at any moment, the same command goes on with the same bits.",
      DATA_HELP "\n\nRUN gets config.json, splits.csv, log.csv, best.safetensors, last.safetensors, state.safetensors, predictions.csv and metrics.json; "
      "with folds, weights and log lie in RUN/fold_K.", train_options, run_train },
    { "eval", "--data DIR --run RUN [options]", "Measures a run on data: metrics with bootstrap intervals, calibration, confusion matrix.",
      "Bags that the run tested are scored by the model that did not see them; bags that it never saw by the mean logits of all folds.", eval_options, run_eval },
    { "score", "--weights FILE [options] FILE...", "Scores bags with a trained model: logits, probabilities and class per bag. A folder stands for all bags in it.",
      "attention score: before the softmax. weight: after it, sums to 1 over a bag. rank: 0 the lowest, 1 the highest score. contribution: the exact summand of "
      "the instance in the class's logit, for models with a linear head on pooled instances.", score_options, run_score },
    { "heatmap", "--weights FILE --out PNG|DIR [options] FILE...", "Draws what a model sees in each patch, as PNG with a JSON beside it that says where the picture lies at level 0.",
      "contribution: the exact summand of the patch in the class's logit, red for, blue against. margin: that less the mean of the other classes'. "
      "rank, weight, score: the attention. Attention says where the model looked, not what it made of it; contribution says both.", heatmap_options, run_heatmap },
    { "demo", "[DIR]", "Makes a synthetic cohort of slides, cross-validates abmil on it, and draws heatmaps beside the true regions.", NULL, demo_options, run_demo },
    { NULL, NULL, NULL, NULL, NULL, NULL }
};

static int run_demo(mil_context *ctx, const arguments *a) { return demo(ctx, a, commands); }

static void print_help(void)
{
    puts("usage: mil COMMAND [options]        mil COMMAND --help for one command\n\n"
         "Multiple instance learning on slide features, with mil.h " MIL_VERSION ".\n");
    for (const command *c = commands; c->name; c++) {
        printf("  %-9s ", c->name);
        print_wrapped(c->summary, 12, 12, 79);
    }
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_help();
        return 2;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0 || strcmp(argv[1], "help") == 0) {
        print_help();
        return 0;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("mil %s\n", mil_version());
        return 0;
    }
    const command *c = commands;
    const char *best = NULL;
    int distance = 1000;
    for (; c->name && strcmp(c->name, argv[1]) != 0; c++) name_nearer(argv[1], c->name, &best, &distance);
    if (argv[1][0] == '-') {
        name_nearer(argv[1], "--help", &best, &distance);
        name_nearer(argv[1], "--version", &best, &distance);
    }
    if (!c->name) tool_usage("no command '%s'; did you mean '%s'? (mil --help)", argv[1], best);
    arguments a = arguments_parse(c, argc - 2, argv + 2);
    mil_context_options options = mil_context_options_default();
    mil_context *ctx;
    options.threads = (int)argument_int(&a, "threads", 0, 1024);
    if (c->run == run_eval || c->run == run_score || c->run == run_heatmap)
        options.precision = strcmp(argument_choice(&a, "precision", "full|bf16"), "bf16") == 0 ? MIL_PRECISION_BF16 : MIL_PRECISION_FULL;
    const mil_status status = mil_context_create(&ctx, &options);
    if (status != MIL_OK) tool_fail("%s", mil_status_text(status));
    if (c->run != run_models && c->run != run_info && c->run != run_check) tool_catch_signals();       // these write files
    const int result = c->run(ctx, &a);
    arguments_free(&a);
    mil_context_free(ctx);
    if (fflush(stdout) != 0 || ferror(stdout)) {
        fputs("mil: standard output: could not be written\n", stderr);
        return 1;
    }
    return result;
}
