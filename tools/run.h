// A run: splits, one fit per fold, and the folder that keeps it all.
//   config.json          what was asked for        splits.csv       which bag is in which part of which fold
//   best.safetensors     the best epoch's weights  last.safetensors, state.safetensors (to go on from), log.csv
//   predictions.csv      logits per bag            metrics.json
// With folds, each has the weights and the log in a folder fold_K of its own.
#ifndef TOOL_RUN_H
#define TOOL_RUN_H
#include "report.h"

typedef struct split { int64_t *train, *val, *test, train_count, val_count, test_count; } split;
typedef struct splits { split *at; int64_t count; int folds; } splits;

TOOL_FN void split_make(split *s, int64_t bags)
{
    memset(s, 0, sizeof *s);
    s->train = TOOL_NEW(int64_t, bags);
    s->val = TOOL_NEW(int64_t, bags);
    s->test = TOOL_NEW(int64_t, bags);
}

TOOL_FN void splits_free(splits *s)
{
    for (int64_t k = 0; k < s->count; k++) {
        free(s->at[k].train);
        free(s->at[k].val);
        free(s->at[k].test);
    }
    free(s->at);
    memset(s, 0, sizeof *s);
}

// Takes a share of the training bags away, stratified, groups together.
TOOL_FN void split_take(const data_set *d, split *s, double share, uint64_t seed, int64_t *to, int64_t *to_count)
{
    if (share <= 0) return;
    const int64_t parts = (int64_t)(1 / share + 0.5) < 2 ? 2 : (int64_t)(1 / share + 0.5);
    int64_t *part = TOOL_NEW(int64_t, s->train_count), kept = 0;
    data_deal(d, s->train, s->train_count, parts, seed, part);
    for (int64_t k = 0; k < s->train_count; k++) {
        if (part[k] == 0) to[(*to_count)++] = s->train[k];
        else s->train[kept++] = s->train[k];
    }
    s->train_count = kept;
    free(part);
}

TOOL_FN int compare_integers(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

// Folds as people number them (from 1, with gaps) become 0, 1, ...; returns how many there are.
TOOL_FN int64_t splits_number(int64_t *part, int64_t n, const char *where)
{
    int64_t *sorted = TOOL_NEW(int64_t, n), K = 0;
    memcpy(sorted, part, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_integers);
    for (int64_t k = 0; k < n; k++) if (k == 0 || sorted[k] != sorted[K - 1]) sorted[K++] = sorted[k];
    for (int64_t k = 0; k < n; k++) part[k] = (const int64_t *)bsearch(&part[k], sorted, (size_t)K, sizeof *sorted, compare_integers) - sorted;
    if (sorted[K - 1] != K - 1)
        tool_warn("%s: its %lld folds are numbered %lld to %lld; here they are 0 to %lld, in that order", where, (long long)K, (long long)sorted[0],
                  (long long)sorted[K - 1], (long long)K - 1);
    free(sorted);
    return K;
}

// folds: "K", "data", or NULL for one split by the data's own `split` column (else by the shares).
TOOL_FN splits splits_make(const data_set *d, const char *folds, int64_t repeat, double val_share, double test_share, uint64_t seed)
{
    splits s = { NULL, 0, 0 };
    int64_t *usable = TOOL_NEW(int64_t, d->count), *part = TOOL_NEW(int64_t, d->count), n = 0, K = 0;
    for (int64_t i = 0; i < d->count; i++) if (d->bag[i].label >= 0 && d->bag[i].count > 0) usable[n++] = i;
    if (n == 0) tool_fail("%s: no bag has both a label and instances", d->path);
    if (folds && strcmp(folds, "data") == 0) {
        if (!d->folds) tool_fail("%s: no folds in it (a column `fold` for every bag, or folds.npy)", d->path);
        if (repeat >= d->repeats) tool_fail("%s: repeat %lld, it has %lld", d->path, (long long)repeat, (long long)d->repeats);
        for (int64_t k = 0; k < n; k++) {
            part[k] = d->folds[repeat * d->count + usable[k]];
            if (part[k] < 0) tool_fail("%s: bag '%s' has fold %lld; folds are numbers 0, 1, ...", d->path, d->bag[usable[k]].name, (long long)part[k]);
        }
        K = splits_number(part, n, d->path);
        if (K < 2) tool_fail("%s: one fold only", d->path);
    } else if (folds) {
        if (!parse_int(folds, &K) || K < 2 || K > n) tool_usage("train: option --folds %s: a number from 2 to %lld, or `data`", folds, (long long)n);
        data_deal(d, usable, n, K, seed, part);
    }
    for (int64_t f = 0; f < K; f++) {
        int64_t k = 0;
        while (k < n && part[k] != f) k++;
        if (k == n) tool_fail("%s: fold %lld of %lld has no bag to test: there are fewer patients than folds", d->path, (long long)f, (long long)K);
    }
    s.folds = folds != NULL;
    s.count = K ? K : 1;
    s.at = TOOL_NEW(split, s.count);
    for (int64_t f = 0; f < s.count; f++) {
        split *p = &s.at[f];
        int named = 0, val = 0;
        split_make(p, d->count);
        for (int64_t k = 0; k < n; k++) named |= d->bag[usable[k]].split != NULL;
        for (int64_t k = 0; k < n; k++) {
            const char *word = !s.folds && named ? d->bag[usable[k]].split : NULL;
            if (!s.folds && named && !word) {
                tool_warn("%s: bag '%s' has no split where others have one, and is left out", d->path, d->bag[usable[k]].name);
                continue;
            }
            if (s.folds ? part[k] == f : word && strcmp(word, "test") == 0) p->test[p->test_count++] = usable[k];
            else if (word && strcmp(word, "val") == 0) p->val[p->val_count++] = usable[k], val = 1;
            else p->train[p->train_count++] = usable[k];
        }
        if (!s.folds && !named) split_take(d, p, test_share, seed + 17, p->test, &p->test_count);
        if (!val) split_take(d, p, val_share, seed + 31 + (uint64_t)f, p->val, &p->val_count);
        if (!p->train_count)
            tool_fail("%s: fold %lld has no bags left to train on: %lld are for testing, %lld for validation", d->path, (long long)f,
                      (long long)p->test_count, (long long)p->val_count);
    }
    free(usable);
    free(part);
    return s;
}

TOOL_FN void splits_write(mil_context *ctx, const char *path, const splits *s, const data_set *d)
{
    text t = { NULL, 0, 0 };
    text_add(&t, "bag,fold,split\n");
    for (int64_t f = 0; f < s->count; f++)
        for (int part = 0; part < 3; part++) {
            const split *p = &s->at[f];
            const int64_t *which = part == 0 ? p->train : part == 1 ? p->val : p->test;
            const int64_t n = part == 0 ? p->train_count : part == 1 ? p->val_count : p->test_count;
            for (int64_t k = 0; k < n; k++) {
                text_field(&t, d->bag[which[k]].name);
                text_add(&t, ",%lld,%s\n", (long long)f, part == 0 ? "train" : part == 1 ? "val" : "test");
            }
        }
    file_write(ctx, path, &t);
    text_free(&t);
}

TOOL_FN void make_folder(const char *path)
{
    char *p = tool_string(path);
    for (char *q = p + 1; ; q++) {
        if (*q != '/' && *q) continue;
        const char end = *q;
        *q = 0;
        if (mkdir(p, 0777) != 0 && errno != EEXIST) tool_fail("%s: %s", p, strerror(errno));
        if (!end) break;
        *q = end;
        if (!q[1]) break;
    }
    if (!is_folder(path)) tool_fail("%s: not a folder", path);
    free(p);
}

// A killed process leaves what it was writing beside its target: `state.safetensors.4711-0.tmp`.
TOOL_FN void remove_leftovers(const char *folder)
{
    static const char *const files[] = { "state.safetensors.", "best.safetensors.", "last.safetensors.", "log.csv.", "config.json.", "splits.csv.",
                                         "predictions.csv.", "metrics.json." };
    DIR *d = opendir(folder);
    for (struct dirent *e; d && (e = readdir(d)) != NULL;) {
        int ours = 0;
        for (size_t k = 0; k < sizeof files / sizeof *files; k++) ours |= strncmp(e->d_name, files[k], strlen(files[k])) == 0;
        if (!ours || !has_ending(e->d_name, ".tmp")) continue;
        char *path = path_join(folder, e->d_name);
        remove(path);
        free(path);
    }
    if (d) closedir(d);
}

// Fits all splits; predictions of their test and validation bags. folder NULL: nothing is written. after_fold (NULL: none) sees
// each fitted model while it is there.
typedef void (*fold_function)(void *user, fit *f, const split *s, int64_t fold);
TOOL_FN predictions run_splits(mil_context *ctx, const data_set *d, const recipe *r, const splits *s, const char *folder, progress *p,
                               fold_function after_fold, void *user)
{
    predictions all = { NULL, 0, 0 };
    for (int64_t k = 0; k < s->count; k++) {
        const split *part = &s->at[k];
        char *name = s->folds ? tool_format("fold %lld/%lld", (long long)k + 1, (long long)s->count) : tool_string("train");
        char *leaf = tool_format("fold_%lld", (long long)k);
        char *place = folder ? s->folds ? path_join(folder, leaf) : tool_string(folder) : NULL;
        fit f;
        memset(&f, 0, sizeof f);
        f.ctx = ctx;
        f.data = d;
        f.recipe = r;
        f.train = part->train;
        f.train_count = part->train_count;
        f.val = part->val;
        f.val_count = part->val_count;
        f.folder = place;
        f.name = name;
        if (place) make_folder(place);
        if (place) remove_leftovers(place);
        fit_run(&f, p);
        all.logits = f.logits;
        for (int pass = 0; pass < 2; pass++) {
            const int64_t n = pass ? part->val_count : part->test_count, *which = pass ? part->val : part->test;
            double *logits = TOOL_NEW(double, n * f.logits);
            predict(ctx, f.model, d, which, n, &f.scale, logits, p, name);
            for (int64_t i = 0; i < n; i++)
                predictions_add(&all, which[i], s->folds ? k : -1, d->bag[which[i]].label, pass ? "val" : "test", logits + i * f.logits, f.temperature);
            free(logits);
        }
        if (after_fold) after_fold(user, &f, part, k);
        fit_free(&f);
        free(name);
        free(leaf);
        free(place);
    }
    if (p) progress_clear(p);
    return all;
}
#endif
