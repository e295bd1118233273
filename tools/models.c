// The README's tables of models, as Markdown: what each is, its size, what it costs, and what it reaches on the demo's synthetic cohort
// and on published sets, cross-validated with the code of `mil train`.
//
//     models cost FOLDER BENCH [MODEL...]             cost with default options, a line per model: name, seconds, MiB
//     models table FOLDER COST [MODEL...]             the table of models; COST: what `models cost` printed
//     models sets DATA [MODEL...]                     on published sets, where the folder DATA is there
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MIL_IMPLEMENTATION
#include "mil.h"
#include "compare.h"
#include "cohort.h"

// More slides than the demo makes: from its 120 some models learn their training slides by heart and nothing else (transmil, rrt).
enum { SLIDES = 480, EPOCHS = 12, PATIENCE = 4, SET_EPOCHS = 15 };
enum { PATCHES = 10000, WIDTH = 1024, THREADS = 2, REPEATS = 7 };

// ---- cost: asked of the bench's own server (tools/bench.c), so that there is one way to measure ------------------------------
static int run_cost(mil_context *ctx, const char *folder, const char *bench, int count, char **words)
{
    char *features = path_join(folder, "features.f32"), *requests = path_join(folder, "requests"), *weights = path_join(folder, "weights.safetensors");
    char line[4096];
    float *row = TOOL_NEW(float, WIDTH);
    text t = { NULL, 0, 0 };
    make_folder(folder);
    FILE *f = fopen(features, "wb");
    for (int64_t i = 0; f && i < PATCHES; i++) {
        for (int64_t k = 0; k < WIDTH; k++) row[k] = (float)random_normal(1, 2, (uint64_t)(i * WIDTH + k));
        if (fwrite(row, sizeof *row, WIDTH, f) != WIDTH) tool_fail("%s: cannot be written", features);
    }
    if (!f || fclose(f) != 0) tool_fail("%s: cannot be written", features);
    text_add(&t, "threads %d\n", THREADS);
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        for (int c = 0; c < m->config_count; c++)
            if (model_wanted(m, m->configs[c].name, count, words))
                text_add(&t, "make %s.%s %s %s\nscore %s.%s %d f32 %d\n", m->name, m->configs[c].name, weights, features, m->name, m->configs[c].name, PATCHES, REPEATS);
    }
    file_write(ctx, requests, &t);
    char *command = tool_format("'%s' --serve < '%s'", bench, requests);
    FILE *answers = popen(command, "r");
    if (!answers || !fgets(line, sizeof line, answers) || strncmp(line, "ok", 2) != 0 || !fgets(line, sizeof line, answers)) tool_fail("%s: no answer", bench);
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        for (int c = 0; c < m->config_count; c++) {
            double times[REPEATS];
            int n = 0;
            if (!model_wanted(m, m->configs[c].name, count, words)) continue;
            for (int k = 0; k < 2; k++) if (!fgets(line, sizeof line, answers) || strncmp(line, "ok", 2) != 0) tool_fail("%s.%s: %s", m->name, m->configs[c].name, line);
            const char *peak = strstr(line, "peak "), *at = strstr(line, "times ");
            if (!peak || !at) tool_fail("%s: an answer not understood: %s", bench, line);
            for (char *end = NULL; n < REPEATS; n++, at = end) {
                times[n] = strtod(n ? at : at + 6, &end);
                if (end == at) break;
                for (int k = n; k > 0 && times[k] < times[k - 1]; k--) { const double x = times[k]; times[k] = times[k - 1]; times[k - 1] = x; }
            }
            printf("%s.%s %.6f %.3f\n", m->name, m->configs[c].name, times[n / 2], strtod(peak + 5, NULL) / 1048576);
            fflush(stdout);
        }
    }
    if (pclose(answers) != 0) tool_fail("%s: failed", bench);
    remove(features);
    remove(weights);
    remove(requests);
    text_free(&t);
    free(row); free(command); free(features); free(requests); free(weights);
    return 0;
}

static int find_cost(const char *path, const char *model, double *seconds, double *mebibytes)
{
    char line[256], name[128];
    FILE *f = fopen(path, "r");
    int found = 0;
    if (!f) tool_fail("%s: cannot be read", path);
    while (!found && fgets(line, sizeof line, f)) found = sscanf(line, "%127s %lf %lf", name, seconds, mebibytes) == 3 && strcmp(name, model) == 0;
    fclose(f);
    return found;
}

// ---- training -----------------------------------------------------------------------------------------------------------------
// What a model needs besides small widths and the common recipe, and why.
typedef struct needs { const char *model, *set; } needs;
static const needs more[] = {
    { "dftd.base",     "paper_attention=true" },           // the reference's sums without a softmax grow with the bag
    { "dftd.base_afs", "paper_attention=true" }
};

// AUROC over all bags, each tested by the fold that did not see it: what `mil train` prints with the same options.
static double cross_validate(mil_context *ctx, const data_set *d, const char *model, const char *folds, double val, int epochs, int standardize)
{
    int64_t smallest = INT64_MAX;
    for (int64_t i = 0; i < d->count; i++) if (d->bag[i].count < smallest) smallest = d->bag[i].count;
    char *small = small_options(ctx, model, smallest), *set = NULL;
    for (size_t k = 0; k < sizeof more / sizeof *more; k++) if (strcmp(more[k].model, model) == 0) set = tool_format("%s%s", small, more[k].set);
    splits s = splits_make(d, folds, 0, val, 0, 0);
    const recipe r = { model, set ? set : small, "optimizer=adamw lr=5e-4 weight_decay=1e-5 schedule=cosine", "loss", epochs, val > 0 ? PATIENCE : 0, 0, standardize, 0, 0, 0 };
    predictions p = run_splits(ctx, d, &r, &s, NULL, NULL, NULL, NULL);
    const double value = bag_auroc(ctx, &p, 0, d->count);
    predictions_free(&p);
    splits_free(&s);
    free(set);
    free(small);
    return value;
}

// "Shao et al., NeurIPS 2021" from "Shao, Bian, Chen, Wang: Title, NeurIPS 2021": up to three authors, and the venue.
static void print_source(const char *citation)
{
    const char *colon = strchr(citation, ':'), *venue = strrchr(citation, ',');
    int authors = 1;
    if (!colon || !venue) { printf("%s", citation); return; }
    for (const char *p = citation; p < colon; p++) authors += *p == ',';
    const size_t n = authors > 3 ? strcspn(citation, ",") : (size_t)(colon - citation);
    printf("%.*s%s%s", (int)n, citation, authors > 3 ? " et al." : "", venue);
}

static void print_number(double x)                         // three digits at most, as 0.012, 0.12, 1.2, 12
{
    printf(x >= 9.95 ? " %.0f" : x >= 0.995 ? " %.1f" : x >= 0.0995 ? " %.2f" : " %.3f", x);
}

// One row per architecture; where its configs differ, the values in their order.
static void print_names(const mil_architecture *m, int count, char **words)
{
    int n = 0;
    for (int c = 0; c < m->config_count; c++) {
        if (!model_wanted(m, m->configs[c].name, count, words)) continue;
        if (n++) printf(", `.%s`", m->configs[c].name);
        else printf("| `%s.%s`", m->name, m->configs[c].name);
    }
}

static int any_wanted(const mil_architecture *m, int count, char **words)
{
    int n = 0;
    for (int c = 0; c < m->config_count; c++) n += model_wanted(m, m->configs[c].name, count, words);
    return n;
}

static int run_table(mil_context *ctx, const char *folder, const char *cost, int count, char **words)
{
    char *cohort = path_join(folder, "cohort");
    int64_t patches, tumour;
    make_folder(cohort);
    cohort_write(ctx, cohort, SLIDES, 0, &patches, &tumour);
    data_set d = data_open(ctx, cohort, NULL, NULL, NULL, 0);
    printf("AUROC: synthetic cohort of %d slides, 3 folds, at most %d epochs, adamw, lr 5e-4, small widths.\n"
           "s and MiB: %d patches of width %d, default options, %d threads.\n\n", SLIDES, EPOCHS, PATCHES, WIDTH, THREADS);
    puts("| name | what it is | source | parameters | AUROC | s | MiB |\n| --- | --- | --- | --- | --- | --- | --- |");
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        double seconds = 0, mebibytes = 0, s, b;
        int n = 0;
        if (!any_wanted(m, count, words)) continue;
        print_names(m, count, words);
        printf(" | %s | ", m->title);
        print_source(m->citation);
        for (int c = 0; c < m->config_count; c++) {
            if (!model_wanted(m, m->configs[c].name, count, words)) continue;
            char *name = tool_format("%s.%s", m->name, m->configs[c].name);
            if (n == 0) {
                mil_model *model = mil_create(ctx, name, NULL);
                if (!model) tool_fail("%s", mil_error(ctx));
                printf(" | %lld | ", (long long)mil_model_parameter_count(model));
                mil_model_free(model);
            }
            fflush(stdout);
            const double auroc = cross_validate(ctx, &d, name, "3", 0.15, EPOCHS, 0);
            if (find_cost(cost, name, &s, &b)) {
                if (s > seconds) seconds = s;
                if (b > mebibytes) mebibytes = b;
            }
            printf("%s%.2f", n++ ? ", " : "", auroc);
            fflush(stdout);
            free(name);
        }
        printf(" |");
        print_number(seconds);
        printf(" |");
        print_number(mebibytes);
        puts(" |");
        fflush(stdout);
    }
    data_free(&d);
    free(cohort);
    return 0;
}

static int run_sets(mil_context *ctx, const char *data, int count, char **words)
{
    static const struct { const char *name; int standardize; } sets[] = { { "musk1", 1 }, { "newsgroups_graphics", 0 } };
    enum { SETS = 2 };
    for (int k = 0; k < SETS; k++) {
        char *path = path_join(data, sets[k].name);
        const int there = is_folder(path);
        if (!there) printf("%s: not there, no table of published sets (MIL_DATA=FOLDER)\n", path);
        free(path);
        if (!there) return 0;
    }
    printf("\nAUROC on published sets: their own 10 folds, %d epochs, else as above.\n\n| name |", SET_EPOCHS);
    for (int k = 0; k < SETS; k++) printf(" %s |", sets[k].name);
    puts("\n| --- | --- | --- |");
    for (int64_t i = 0; i < mil_architecture_count(); i++) {
        const mil_architecture *m = mil_architecture_at(i);
        if (!any_wanted(m, count, words)) continue;
        print_names(m, count, words);
        printf(" |");
        for (int k = 0; k < SETS; k++) {
            char *path = path_join(data, sets[k].name);
            data_set e = data_open(ctx, path, NULL, NULL, NULL, 0);
            int n = 0;
            for (int c = 0; c < m->config_count; c++) {
                if (!model_wanted(m, m->configs[c].name, count, words)) continue;
                char *name = tool_format("%s.%s", m->name, m->configs[c].name);
                printf("%s%.2f", n++ ? ", " : " ", cross_validate(ctx, &e, name, "data", 0, SET_EPOCHS, sets[k].standardize));
                fflush(stdout);
                free(name);
            }
            printf(" |");
            data_free(&e);
            free(path);
        }
        puts("");
        fflush(stdout);
    }
    return 0;
}

int main(int argc, char **argv)
{
    static const char usage[] = "models: cost FOLDER BENCH [MODEL...], table FOLDER COST [MODEL...], or sets DATA [MODEL...]";
    int status;
    if (argc < 3) tool_usage("%s", usage);
    mil_context *ctx = small_context();
    if (strcmp(argv[1], "cost") == 0 && argc > 3) status = run_cost(ctx, argv[2], argv[3], argc - 4, argv + 4);
    else if (strcmp(argv[1], "table") == 0 && argc > 3) status = run_table(ctx, argv[2], argv[3], argc - 4, argv + 4);
    else if (strcmp(argv[1], "sets") == 0) status = run_sets(ctx, argv[2], argc - 3, argv + 3);
    else tool_usage("%s", usage);
    mil_context_free(ctx);
    return status;
}
