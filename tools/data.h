// Data sets: a folder with labels.csv and a file of features per bag, or a packed set of .npy files. Features stay in their
// mapped files until a bag is opened; at most one bag is in use at a time.
#ifndef TOOL_DATA_H
#define TOOL_DATA_H
#include <dirent.h>
#include <sys/stat.h>
#include "table.h"

// ---- single values of a tensor ----
TOOL_FN float half_value(uint16_t h)
{
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double sign = h & 0x8000 ? -1 : 1;
    if (exponent == 31) return fraction ? (float)NAN : (float)(sign * (double)INFINITY);
    return (float)(sign * (exponent ? ldexp(1024 + fraction, exponent - 25) : ldexp(fraction, -24)));
}

TOOL_FN double value_at(const void *p, mil_dtype dtype)
{
#define VALUE(constant, type) case constant: { type v; memcpy(&v, p, sizeof v); return (double)v; }
    switch (dtype) {
    VALUE(MIL_F32, float) VALUE(MIL_F64, double) VALUE(MIL_I8, int8_t) VALUE(MIL_U8, uint8_t) VALUE(MIL_I16, int16_t)
    VALUE(MIL_U16, uint16_t) VALUE(MIL_I32, int32_t) VALUE(MIL_U32, uint32_t) VALUE(MIL_I64, int64_t) VALUE(MIL_U64, uint64_t)
    case MIL_F16: { uint16_t h; memcpy(&h, p, 2); return (double)half_value(h); }
    case MIL_BF16: { uint16_t h; uint32_t u; float f; memcpy(&h, p, 2); u = (uint32_t)h << 16; memcpy(&f, &u, 4); return (double)f; }
    case MIL_BOOL: return *(const unsigned char *)p != 0;
    default: return 0;
    }
#undef VALUE
}

// Element `index` in row-major order, whatever the strides.
TOOL_FN double tensor_value(const mil_tensor *t, int64_t index)
{
    int packed = 1;
    for (int a = 0; a < t->rank; a++) packed &= t->stride[a] == 0;
    if (packed) return value_at((const char *)t->data + index * (int64_t)mil_dtype_size(t->dtype), t->dtype);
    int64_t offset = 0;
    for (int a = t->rank - 1; a >= 0; a--) {
        offset += index % t->shape[a] * t->stride[a];
        index /= t->shape[a];
    }
    return value_at((const char *)t->data + offset, t->dtype);
}

TOOL_FN int dtype_is_integer(mil_dtype d) { return d != MIL_F32 && d != MIL_F64 && d != MIL_F16 && d != MIL_BF16; }

// Drops a leading axis of length 1, which some writers add.
TOOL_FN mil_tensor tensor_squeezed(const mil_tensor *t, int rank)
{
    mil_tensor out = *t;
    while (out.rank > rank && out.shape[0] == 1) {
        out.rank--;
        memmove(out.shape, out.shape + 1, (size_t)out.rank * sizeof *out.shape);
        memmove(out.stride, out.stride + 1, (size_t)out.rank * sizeof *out.stride);
    }
    return out;
}

// ---- one file of features ----
typedef struct scaling { int64_t dim; float *mean, *factor; } scaling;             // x -> (x - mean) * factor, per feature

typedef struct open_bag {
    mil_bag      bag;                                      // bag.features is [N, D]
    int64_t      instances, dim;
    mil_tensors *file;                                     // a .safetensors, or
    mil_npy     *npy;                                      // an .npy
    float       *rows;                                     // converted features, or NULL
    mil_named_tensor *extra;
    mil_tensor   labels;                                   // [N] labels of instances; data NULL: none
} open_bag;

TOOL_FN void bag_close(open_bag *b)
{
    mil_tensors_free(b->file);
    mil_npy_free(b->npy);
    free(b->rows);
    free(b->extra);
    memset(b, 0, sizeof *b);
}

// Makes features standardised; a no-op without a scaling.
TOOL_FN void bag_scale(open_bag *b, const scaling *s)
{
    if (!s || !s->mean || b->rows) return;
    if (s->dim != b->dim) return;
    b->rows = TOOL_NEW(float, b->instances * b->dim);
    for (int64_t i = 0; i < b->instances; i++)
        for (int64_t d = 0; d < b->dim; d++)
            b->rows[i * b->dim + d] = ((float)tensor_value(&b->bag.features, i * b->dim + d) - s->mean[d]) * s->factor[d];
    b->bag.features = mil_tensor_matrix(b->rows, MIL_F32, b->instances, b->dim);
}

TOOL_FN const mil_tensor *find_tensor(const mil_tensors *file, const char *wanted, const char *names)
{
    if (wanted) return mil_tensors_get(file, wanted);
    for (const char *p = names; *p;) {
        const size_t n = strcspn(p, "|");
        for (int64_t i = 0; i < mil_tensors_count(file); i++)
            if (strlen(mil_tensors_name(file, i)) == n && memcmp(mil_tensors_name(file, i), p, n) == 0) return mil_tensors_at(file, i);
        p += n + (p[n] == '|');
    }
    return NULL;
}

// Opens a .safetensors or .npy file as a bag. feature_name: the tensor to take, NULL: one of the usual names.
TOOL_FN open_bag bag_open(mil_context *ctx, const char *path, const char *feature_name)
{
    open_bag b;
    memset(&b, 0, sizeof b);
    if (has_ending(path, ".npy")) {
        tool_check(ctx, mil_npy_open(ctx, path, MIL_FILE_MAP, &b.npy));
        b.bag.features = tensor_squeezed(mil_npy_tensor(b.npy), 2);
    } else if (has_ending(path, ".safetensors")) {
        tool_check(ctx, mil_tensors_open(ctx, path, MIL_FILE_MAP, &b.file));
        const int64_t count = mil_tensors_count(b.file);
        const mil_tensor *f = find_tensor(b.file, feature_name, "features|feats|embeddings|x");
        if (!f && !feature_name && count == 1) f = mil_tensors_at(b.file, 0);
        if (!f) {
            text names = { NULL, 0, 0 };
            for (int64_t i = 0; i < count && i < 8; i++) text_add(&names, "%s'%s'", i ? ", " : "", mil_tensors_name(b.file, i));
            tool_fail("%s: no tensor '%s'; it has %s%s (--features NAME takes another)", path, feature_name ? feature_name : "features",
                      names.data ? names.data : "no tensors", count > 8 ? ", ..." : "");
        }
        b.bag.features = tensor_squeezed(f, 2);
        const mil_tensor *c = find_tensor(b.file, NULL, "coords|coordinates");
        if (c) {
            b.bag.coords = tensor_squeezed(c, 2);
            if (mil_tensor_count(c) == 0) memset(&b.bag.coords, 0, sizeof b.bag.coords);
        }
        const mil_tensor *l = find_tensor(b.file, NULL, "instance_labels|patch_labels");
        if (l) b.labels = *l;
        b.extra = TOOL_NEW(mil_named_tensor, count);
        for (int64_t i = 0; i < count; i++) {
            const mil_tensor *t = mil_tensors_at(b.file, i);
            if (t == f || t == c || t == l) continue;
            b.extra[b.bag.extra_count].name = mil_tensors_name(b.file, i);
            b.extra[b.bag.extra_count++].tensor = *t;
        }
        b.bag.extra = b.extra;
    } else {
        tool_fail("%s: bags are .safetensors or .npy files", path);
    }
    mil_tensor *f = &b.bag.features;
    if (f->rank == 1 && f->shape[0] == 0) { f->rank = 2; f->shape[1] = 0; f->stride[0] = f->stride[1] = 0; }       // no tissue
    if (f->rank != 2) tool_fail("%s: features have %d axes instead of 2 (instances, width)", path, f->rank);
    b.instances = f->shape[0];
    b.dim = f->shape[1];
    if (b.bag.coords.data && (b.bag.coords.rank != 2 || b.bag.coords.shape[0] != b.instances || b.bag.coords.shape[1] != 2))
        tool_fail("%s: coordinates of %lld patches [%lld, %lld] do not fit features of %lld", path, (long long)b.bag.coords.shape[0],
                  (long long)b.bag.coords.shape[0], (long long)(b.bag.coords.rank > 1 ? b.bag.coords.shape[1] : 1), (long long)b.instances);
    if (b.labels.data && mil_tensor_count(&b.labels) != b.instances)
        tool_fail("%s: %lld instance labels for %lld instances", path, (long long)mil_tensor_count(&b.labels), (long long)b.instances);
    return b;
}

// ---- sets of bags ----
typedef struct data_entry {
    char   *name, *path;                                   // path NULL: rows of a packed set
    int64_t label;                                         // class; -1: none
    int64_t first, count;                                  // packed: its rows; count: instances
    char   *word, *group, *split;                          // label as written; whose slides stay together; train, val or test
    int64_t fold;                                          // -1: none given
} data_entry;

typedef struct data_set {
    mil_context *ctx;
    char       *path, *feature_name;
    data_entry *bag;
    int64_t     count, dim, class_count;
    char      **class_name;
    mil_npy    *features, *index, *instances;              // packed: features, or images and the rows that a bag takes of them
    double      scale;                                     // of images: 1/255
    int64_t    *folds, repeats;                            // [repeats, count] or NULL: in which fold a bag is tested
} data_set;

// last: length of the last axis, when asked for.
TOOL_FN int64_t *read_integers(mil_context *ctx, const char *path, int64_t *count, int64_t *last)
{
    mil_npy *npy;
    tool_check(ctx, mil_npy_open(ctx, path, MIL_FILE_MAP, &npy));
    const mil_tensor *t = mil_npy_tensor(npy);
    *count = mil_tensor_count(t);
    if (last) *last = t->rank ? t->shape[t->rank - 1] : 1;
    int64_t *x = TOOL_NEW(int64_t, *count);
    for (int64_t i = 0; i < *count; i++) {
        const double v = tensor_value(t, i);
        if (v != floor(v) || !(fabs(v) < 9e15)) tool_fail("%s: value %lld is %g, not an integer", path, (long long)i, v);
        x[i] = (int64_t)v;
    }
    mil_npy_free(npy);
    return x;
}

TOOL_FN int path_exists(const char *folder, const char *name)
{
    struct stat st;
    char *path = path_join(folder, name);
    const int found = stat(path, &st) == 0;
    free(path);
    return found;
}

TOOL_FN int is_folder(const char *path)
{
    struct stat st;
    return stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

TOOL_FN int compare_names(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

// Names of the bag files in a folder, sorted.
TOOL_FN char **list_bags(const char *folder, int64_t *count)
{
    char **names = NULL;
    DIR *d = opendir(folder);
    *count = 0;
    if (!d) tool_fail("%s: %s", folder, strerror(errno));
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        if (e->d_name[0] == '.' || (!has_ending(e->d_name, ".safetensors") && !has_ending(e->d_name, ".npy"))) continue;
        names = (char **)tool_grow(names, (size_t)*count + 1, sizeof *names);
        names[(*count)++] = tool_string(e->d_name);
    }
    closedir(d);
    if (*count) qsort(names, (size_t)*count, sizeof *names, compare_names);
    return names;
}

TOOL_FN int compare_words(const void *a, const void *b)    // numbers by value, then words
{
    const char *x = *(char *const *)a, *y = *(char *const *)b;
    double u, v;
    const int first = parse_real(x, &u), second = parse_real(y, &v);
    if (first != second) return first ? -1 : 1;
    return first && u != v ? (u < v ? -1 : 1) : strcmp(x, y);
}

// Classes from the words of the labels: sorted, each once. given: the classes of a trained model, in its order, or NULL.
TOOL_FN void data_classes(data_set *d, const char *where, char *const *given, int64_t given_count)
{
    if (given) {
        d->class_count = given_count;
        d->class_name = TOOL_NEW(char *, given_count);
        for (int64_t c = 0; c < given_count; c++) d->class_name[c] = tool_string(given[c]);
    } else {
        char **words = TOOL_NEW(char *, d->count);
        int64_t n = 0;
        for (int64_t i = 0; i < d->count; i++) if (d->bag[i].word) words[n++] = d->bag[i].word;
        if (n) qsort(words, (size_t)n, sizeof *words, compare_words);
        d->class_name = TOOL_NEW(char *, n);
        for (int64_t i = 0; i < n; i++) if (i == 0 || strcmp(words[i], words[i - 1]) != 0) d->class_name[d->class_count++] = tool_string(words[i]);
        free(words);
    }
    for (int64_t i = 0; i < d->count; i++) {
        data_entry *b = &d->bag[i];
        int64_t c = 0;
        b->label = -1;
        if (!b->word) continue;
        while (c < d->class_count && strcmp(b->word, d->class_name[c]) != 0) c++;
        if (c == d->class_count) {
            text names = { NULL, 0, 0 };
            for (c = 0; c < d->class_count; c++) text_add(&names, "%s'%s'", c ? ", " : "", d->class_name[c]);
            tool_fail("%s: bag '%s' has class '%s'; the model knows %s", where, b->name, b->word, names.data);
        }
        b->label = c;
    }
}

// ---- packed sets ----
TOOL_FN void data_open_packed(data_set *d)
{
    int64_t n, labels_count, total;
    const char *images = path_exists(d->path, "features.npy") ? NULL : path_exists(d->path, "images.npy") ? "images.npy"
                       : path_exists(d->path, "../images.npy") ? "../images.npy" : NULL;
    char *path = path_join(d->path, images ? images : "features.npy");
    tool_check(d->ctx, mil_npy_open(d->ctx, path, MIL_FILE_MAP, &d->features));
    const mil_tensor *f = mil_npy_tensor(d->features);
    if (f->rank != 2) tool_fail("%s: %d axes instead of 2 (instances, width)", path, f->rank);
    d->dim = f->shape[1];
    if (d->dim == 0) tool_fail("%s: features have width 0", path);
    total = f->shape[0];
    d->scale = 1;
    if (images) {
        char *index = path_join(d->path, "index.npy");
        tool_check(d->ctx, mil_npy_open(d->ctx, index, MIL_FILE_MAP, &d->index));
        total = mil_tensor_count(mil_npy_tensor(d->index));
        for (int64_t i = 0; i < total; i++) {
            const double row = tensor_value(mil_npy_tensor(d->index), i);
            if (!(row >= 0 && row < (double)f->shape[0])) tool_fail("%s: value %lld is %g; %s has %lld rows", index, (long long)i, row, path, (long long)f->shape[0]);
        }
        if (f->dtype == MIL_U8) d->scale = 1.0 / 255;
        free(index);
    }
    free(path);

    path = path_join(d->path, "bag.npy");
    int64_t *bag = read_integers(d->ctx, path, &n, NULL);
    if (n != total) tool_fail("%s: %lld values for %lld instances", path, (long long)n, (long long)total);
    char *labels_path = path_join(d->path, "labels.npy");
    int64_t *labels = read_integers(d->ctx, labels_path, &labels_count, NULL);
    d->count = labels_count;
    d->bag = TOOL_NEW(data_entry, labels_count);
    for (int64_t i = 0; i < n; i++) {
        if (bag[i] < 0 || bag[i] >= labels_count) tool_fail("%s: value %lld is bag %lld; %s has %lld labels", path, (long long)i, (long long)bag[i], labels_path, (long long)labels_count);
        if (i && bag[i] < bag[i - 1]) tool_fail("%s: value %lld: bag %lld comes after bag %lld; a bag's rows must stand together, in order", path, (long long)i, (long long)bag[i], (long long)bag[i - 1]);
        if (d->bag[bag[i]].count++ == 0) d->bag[bag[i]].first = i;
    }
    for (int64_t i = 0; i < labels_count; i++) {
        data_entry *b = &d->bag[i];
        b->name = tool_format("%lld", (long long)i);
        if (b->count == 0) tool_warn("%s: bag %lld has no instances", path, (long long)i);
        b->word = labels[i] < 0 ? NULL : tool_format("%lld", (long long)labels[i]);
        b->fold = -1;
    }
    free(bag);
    free(labels);
    free(labels_path);
    free(path);
    const char *const more[] = { "folds.npy", "instance_labels.npy", "patient.npy", "test.npy" };
    for (int k = 0; k < 4; k++) {
        if (!path_exists(d->path, more[k])) continue;
        path = path_join(d->path, more[k]);
        if (k == 1) {
            tool_check(d->ctx, mil_npy_open(d->ctx, path, MIL_FILE_MAP, &d->instances));
            if (mil_tensor_count(mil_npy_tensor(d->instances)) != total) tool_fail("%s: its length is not the %lld instances", path, (long long)total);
            free(path);
            continue;
        }
        int64_t last = 0, *x = read_integers(d->ctx, path, &n, &last);
        if (n % (d->count ? d->count : 1) != 0 || (k > 0 && n != d->count)) tool_fail("%s: %lld values for %lld bags", path, (long long)n, (long long)d->count);
        if (k == 0 && last != d->count) tool_fail("%s: its last axis is %lld, not the %lld bags", path, (long long)last, (long long)d->count);
        if (k == 0) {
            d->folds = x;
            d->repeats = n / (d->count ? d->count : 1);
        } else {
            for (int64_t i = 0; i < n; i++) {
                if (k == 2) d->bag[i].group = tool_format("%lld", (long long)x[i]);
                else d->bag[i].split = tool_string(x[i] ? "test" : "train");
            }
            free(x);
        }
        free(path);
    }
}

// ---- folders with a table ----
typedef struct data_columns { const char *labels, *bag, *label, *split, *group; } data_columns;       // NULL: the usual names

TOOL_FN int64_t pick_column(const table *t, const char *wanted, const char *usual, int needed, const char *flag)
{
    const int64_t k = table_column(t, wanted ? wanted : usual);
    for (int64_t c = k + 1; k >= 0 && c < t->columns; c++)
        if (strcasecmp(t->row[0][k], t->row[0][c]) == 0) tool_fail("%s: two columns are called '%s'", t->path, t->row[0][c]);
    if (k >= 0 || (!wanted && !needed)) return k;
    text names = { NULL, 0, 0 };
    for (int64_t c = 0; c < t->columns; c++) text_add(&names, "%s'%s'", c ? ", " : "", t->row[0][c]);
    if (wanted) tool_fail("%s: no column '%s'; it has %s", t->path, wanted, names.data);
    tool_fail("%s: no column '%.*s'; it has %s (%s NAME takes another)", t->path, (int)strcspn(usual, "|"), usual, names.data, flag);
}

// What a message about a bag names: its file, or its number in the packed set.
TOOL_FN const char *bag_place(const data_set *d, int64_t i) { return d->bag[i].path ? d->bag[i].path : d->path; }

// The file of a bag: the same name, the name with an ending, or the same stem. -1: none; a stem that fits two files stops.
TOOL_FN int64_t find_file(char *const *files, char *const *stems, int64_t count, const char *name, const char *where)
{
    int64_t found = -1;
    for (int64_t i = 0; i < count; i++) if (strcmp(files[i], name) == 0) return i;
    for (int pass = 0; pass < 2 && found < 0; pass++) {
        char *stem = pass ? path_stem(name) : tool_string(path_name(name));
        for (int64_t i = 0; i < count; i++) {
            if (strcmp(stems[i], stem) != 0) continue;
            if (found >= 0) tool_fail("%s: bag '%s' fits two files, '%s' and '%s'; write the whole file name", where, name, files[found], files[i]);
            found = i;
        }
        free(stem);
    }
    return found;
}

TOOL_FN void data_open_table(data_set *d, const data_columns *columns)
{
    char *path = columns->labels ? tool_string(columns->labels) : path_join(d->path, path_exists(d->path, "labels.csv") ? "labels.csv" : "labels.tsv");
    table t = table_open(d->ctx, path);
    const int64_t bag = pick_column(&t, columns->bag, "bag|slide_id|slide|bag_name|filename|file|name|wsi|image|id", 1, "--bag-column");
    const int64_t label = pick_column(&t, columns->label, "label|class|target|diagnosis", 0, "--label-column");
    if (label < 0) tool_warn("%s: no column 'label', so no bag has a label (--label-column NAME takes another)", path);
    const int64_t split = pick_column(&t, columns->split, "split", 0, "--split-column");
    const int64_t fold = pick_column(&t, NULL, "fold", 0, "");
    const int64_t group = pick_column(&t, columns->group, "patient|patient_id|case_id|case|group", 0, "--group-column");
    int64_t file_count, missing = 0, unlabelled = 0, empty = 0;
    char *folder = path_exists(d->path, "features") ? path_join(d->path, "features") : tool_string(d->path);
    char **files = list_bags(folder, &file_count), **stems = TOOL_NEW(char *, file_count);
    int64_t *taken = TOOL_NEW(int64_t, file_count);
    for (int64_t i = 0; i < file_count; i++) stems[i] = path_stem(files[i]);
    d->bag = TOOL_NEW(data_entry, t.rows);
    for (int64_t r = 1; r < t.rows; r++) {
        tool_stop_if_asked();
        char **row = t.row[r];
        data_entry *b = &d->bag[d->count];
        if (!row[bag][0]) tool_fail("%s: line %lld has no bag", path, (long long)t.line[r]);
        const int64_t f = find_file(files, stems, file_count, row[bag], path);
        if (f < 0) {
            tool_warn("%s: line %lld: no features for bag '%s' in %s", path, (long long)t.line[r], row[bag], folder);
            missing++;
            continue;
        }
        if (taken[f]) tool_fail("%s: line %lld: bag '%s' is the file of line %lld again", path, (long long)t.line[r], row[bag], (long long)taken[f]);
        taken[f] = t.line[r];
        b->name = tool_string(row[bag]);
        b->path = path_join(folder, files[f]);
        b->word = label >= 0 && row[label][0] ? tool_string(row[label]) : NULL;
        if (b->word && !text_is_utf8(b->word))
            tool_fail("%s: line %lld: the label '%s' is not UTF-8; save the table as UTF-8", path, (long long)t.line[r], b->word);
        if (label >= 0 && !b->word) tool_warn("%s: line %lld: bag '%s' has no label", path, (long long)t.line[r], row[bag]);
        b->group = group >= 0 && row[group][0] ? tool_string(row[group]) : NULL;
        b->fold = -1;
        if (split >= 0 && row[split][0]) {
            const char *s = row[split];
            const char *known = strcasecmp(s, "train") == 0 || strcasecmp(s, "training") == 0 ? "train"
                : strcasecmp(s, "val") == 0 || strcasecmp(s, "valid") == 0 || strcasecmp(s, "validation") == 0 || strcasecmp(s, "dev") == 0 ? "val"
                : strcasecmp(s, "test") == 0 || strcasecmp(s, "testing") == 0 ? "test" : NULL;
            if (!known) tool_fail("%s: line %lld: split '%s' is none of train, val, test", path, (long long)t.line[r], s);
            b->split = tool_string(known);
        }
        if (fold >= 0 && row[fold][0] && (!parse_int(row[fold], &b->fold) || b->fold < 0 || b->fold > 1000))
            tool_fail("%s: line %lld: fold '%s' is not a number 0, 1, ...", path, (long long)t.line[r], row[fold]);
        open_bag open = bag_open(d->ctx, b->path, d->feature_name);
        b->count = open.instances;
        if (open.instances == 0) {
            tool_warn("%s: no instances (a slide without tissue?)", b->path);
            empty++;
        } else if (open.dim == 0) {
            tool_fail("%s: features have width 0", b->path);
        } else if (d->dim == 0) {
            d->dim = open.dim;
        } else if (open.dim != d->dim) {
            tool_fail("%s: features have width %lld, those of the bags before have %lld", b->path, (long long)open.dim, (long long)d->dim);
        }
        bag_close(&open);
        d->count++;
    }
    for (int64_t i = 0; i < file_count; i++) {
        if (!taken[i]) {
            tool_warn("%s: no line for the features '%s'", path, files[i]);
            unlabelled++;
        }
        free(files[i]);
        free(stems[i]);
    }
    if (missing || unlabelled)
        tool_warn("%s: %lld bags in use, %lld without features, %lld files without a line", d->path, (long long)d->count, (long long)missing, (long long)unlabelled);
    if (d->count == empty) tool_fail("%s: no bag of it has features in %s", path, folder);
    if (fold >= 0) {
        d->folds = TOOL_NEW(int64_t, d->count);
        d->repeats = 1;
        for (int64_t i = 0; i < d->count; i++) {
            d->folds[i] = d->bag[i].fold;
            if (d->bag[i].fold >= 0) continue;
            free(d->folds);                                // folds for some bags only are no folds
            d->folds = NULL;
            d->repeats = 0;
            break;
        }
    }
    free(files);
    free(stems);
    free(taken);
    free(folder);
    free(path);
    table_free(&t);
}

// classes NULL: from the labels.
TOOL_FN data_set data_open(mil_context *ctx, const char *path, const char *feature_name, const data_columns *columns, char *const *classes, int64_t class_count)
{
    data_set d;
    const data_columns none = { NULL, NULL, NULL, NULL, NULL };
    memset(&d, 0, sizeof d);
    d.ctx = ctx;
    d.path = tool_string(path);
    d.feature_name = feature_name ? tool_string(feature_name) : NULL;
    if (!columns) columns = &none;
    if (!is_folder(path)) tool_fail("%s: %s", path, path_exists(".", path) || path[0] == '/' ? "not a folder of data" : "no such folder");
    if (columns->labels || path_exists(path, "labels.csv") || path_exists(path, "labels.tsv")) data_open_table(&d, columns);
    else if (path_exists(path, "bag.npy") && path_exists(path, "labels.npy")) data_open_packed(&d);
    else tool_fail("%s: neither labels.csv nor bag.npy and labels.npy are in it", path);
    data_classes(&d, path, classes, class_count);
    return d;
}

TOOL_FN void data_free(data_set *d)
{
    for (int64_t i = 0; i < d->count; i++) {
        free(d->bag[i].name);
        free(d->bag[i].path);
        free(d->bag[i].word);
        free(d->bag[i].group);
        free(d->bag[i].split);
    }
    for (int64_t c = 0; c < d->class_count; c++) free(d->class_name[c]);
    free(d->class_name);
    free(d->bag);
    free(d->folds);
    free(d->path);
    free(d->feature_name);
    mil_npy_free(d->features);
    mil_npy_free(d->index);
    mil_npy_free(d->instances);
    memset(d, 0, sizeof *d);
}

// Opens bag i; scale NULL: features as they are.
TOOL_FN open_bag data_bag(const data_set *d, int64_t i, const scaling *scale)
{
    const data_entry *e = &d->bag[i];
    open_bag b;
    tool_stop_if_asked();
    if (e->path) {
        b = bag_open(d->ctx, e->path, d->feature_name);
    } else {
        const mil_tensor *f = mil_npy_tensor(d->features);
        const int64_t row = f->stride[0] ? f->stride[0] : d->dim * (int64_t)mil_dtype_size(f->dtype);
        memset(&b, 0, sizeof b);
        b.instances = e->count;
        b.dim = d->dim;
        b.bag.features = *f;
        b.bag.features.shape[0] = e->count;
        b.bag.features.data = (char *)f->data + e->first * row;
        if (d->index) {
            b.rows = TOOL_NEW(float, e->count * d->dim);
            for (int64_t k = 0; k < e->count; k++) {
                const int64_t from = (int64_t)tensor_value(mil_npy_tensor(d->index), e->first + k);
                for (int64_t c = 0; c < d->dim; c++) b.rows[k * d->dim + c] = (float)(tensor_value(f, from * d->dim + c) * d->scale);
            }
            b.bag.features = mil_tensor_matrix(b.rows, MIL_F32, e->count, d->dim);
        }
        if (d->instances) {
            const mil_tensor *l = mil_npy_tensor(d->instances);
            b.labels = mil_tensor_make((const char *)l->data + e->first * (int64_t)mil_dtype_size(l->dtype), l->dtype, 1, &e->count);
        }
    }
    bag_scale(&b, scale);
    return b;
}

// Mean and deviation of each feature over all instances of the bags in `which`.
TOOL_FN scaling data_scaling(const data_set *d, const int64_t *which, int64_t count)
{
    scaling s = { d->dim, TOOL_NEW(float, d->dim), TOOL_NEW(float, d->dim) };
    double *sum = TOOL_NEW(double, d->dim), *square = TOOL_NEW(double, d->dim), n = 0;
    for (int64_t k = 0; k < count; k++) {
        open_bag b = data_bag(d, which[k], NULL);
        for (int64_t i = 0; i < b.instances; i++, n++)
            for (int64_t c = 0; c < d->dim; c++) {
                const double x = tensor_value(&b.bag.features, i * d->dim + c), delta = x - sum[c];
                sum[c] += delta / (n + 1);                 // Welford's running mean and sum of squares
                square[c] += delta * (x - sum[c]);
            }
        bag_close(&b);
    }
    for (int64_t c = 0; c < d->dim; c++) {
        const double deviation = n > 0 ? sqrt(square[c] / n) : 0;
        s.mean[c] = (float)sum[c];
        s.factor[c] = (float)(deviation > 1e-12 ? 1 / deviation : 1);
    }
    free(sum);
    free(square);
    return s;
}

TOOL_FN void scaling_free(scaling *s)
{
    free(s->mean);
    free(s->factor);
    memset(s, 0, sizeof *s);
}

// ---- splits ----
// Deals bags into `parts`, stratified by class, so that a group stays together: groups go, in random order within each class (large
// groups first), to the part that has least of that class. A group's class is that of its most frequent label.
TOOL_FN void data_deal(const data_set *d, const int64_t *which, int64_t count, int64_t parts, uint64_t seed, int64_t *part)
{
    int64_t *head = TOOL_NEW(int64_t, count), *size = TOOL_NEW(int64_t, count), *order = TOOL_NEW(int64_t, count), groups = 0;
    const int64_t classes = d->class_count ? d->class_count : 1;
    double *load = TOOL_NEW(double, parts * classes), *total = TOOL_NEW(double, parts);
    int64_t *group = TOOL_NEW(int64_t, count), *tally = TOOL_NEW(int64_t, count * classes);
    for (int64_t k = 0; k < count; k++) {
        const data_entry *b = &d->bag[which[k]];
        int64_t g = b->group ? 0 : groups;
        for (; b->group && g < groups; g++) if (d->bag[which[head[g]]].group && strcmp(d->bag[which[head[g]]].group, b->group) == 0) break;
        if (g == groups) head[groups++] = k;
        group[k] = g;
        size[g]++;
        if (b->label >= 0) tally[g * classes + b->label]++;
    }
    for (int64_t g = 0; g < groups; g++) order[g] = g;
    random_shuffle(seed, 0x5917, order, groups);
    for (int64_t i = 1; i < groups; i++)                   // stable: large groups first, else the random order
        for (int64_t j = i; j > 0 && size[order[j]] > size[order[j - 1]]; j--) {
            const int64_t t = order[j];
            order[j] = order[j - 1];
            order[j - 1] = t;
        }
    int64_t *to = TOOL_NEW(int64_t, count);
    for (int64_t i = 0; i < groups; i++) {
        const int64_t g = order[i];
        int64_t c = 0, best = 0;
        for (int64_t k = 1; k < classes; k++) if (tally[g * classes + k] > tally[g * classes + c]) c = k;
        for (int64_t p = 1; p < parts; p++) {
            const double a = load[p * classes + c], b = load[best * classes + c];
            if (a < b || (a == b && total[p] < total[best])) best = p;
        }
        to[g] = best;
        load[best * classes + c] += (double)size[g];
        total[best] += (double)size[g];
    }
    for (int64_t k = 0; k < count; k++) part[k] = to[group[k]];
    free(head); free(size); free(order); free(load); free(total); free(group); free(tally); free(to);
}
#endif
