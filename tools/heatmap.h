// Scores of patches on the slide: the grid that the patches lie on, pictures, GeoJSON.
#ifndef TOOL_HEATMAP_H
#define TOOL_HEATMAP_H
#include "picture.h"
#include "fit.h"

// ---- what a model says about each instance ----
typedef struct instance_scores {
    int64_t instances, heads, classes;                     // K columns of attention; C columns of contribution
    double *score, *weight, *rank;                         // [N, K]: before and after the softmax; rank in 0..1, 1 the highest
    double *contribution;                                  // [N, C]: exact summand of each logit
    double *margin;                                        // [N, C]: that summand less the mean of the other logits' (C = 1: the summand)
    double *logits;                                        // [C]
} instance_scores;

typedef struct ranked { double value; int64_t index; } ranked;

TOOL_FN int compare_ranked(const void *a, const void *b)
{
    const ranked *x = (const ranked *)a, *y = (const ranked *)b;
    if (x->value != y->value) return x->value < y->value ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

TOOL_FN double *scorer_result(mil_context *ctx, mil_scorer *s, mil_result which, int64_t rows, int64_t *columns)
{
    const int64_t n = mil_scorer_count(s, which);
    *columns = rows ? n / rows : 0;
    if (n <= 0 || n % rows) { *columns = 0; return NULL; }
    double *x = TOOL_NEW(double, n);
    tool_check(ctx, mil_scorer_read_f64(s, which, x, n));
    return x;
}

// scorer: made by instance_scorer. name: for the message.
TOOL_FN instance_scores score_instances(mil_context *ctx, mil_scorer *scorer, const open_bag *b, int64_t C, const char *name)
{
    instance_scores s;
    int64_t columns;
    memset(&s, 0, sizeof s);
    s.instances = b->instances;
    if (mil_scorer_score(scorer, &b->bag) != MIL_OK) tool_fail("%s: %s", name, mil_error(ctx));
    s.logits = scorer_result(ctx, scorer, MIL_LOGITS, 1, &columns);
    if (!s.logits) tool_fail("%s: the model gives no logits", name);
    s.score = scorer_result(ctx, scorer, MIL_ATTENTION, b->instances, &s.heads);
    s.weight = scorer_result(ctx, scorer, MIL_WEIGHTS, b->instances, &columns);
    if (!s.score && s.weight) s.heads = columns;
    if (s.weight && columns != s.heads) { free(s.weight); s.weight = NULL; }
    s.rank = scorer_result(ctx, scorer, MIL_RANK, b->instances, &columns);
    if (s.rank && columns != s.heads) { free(s.rank); s.rank = NULL; }
    s.contribution = scorer_result(ctx, scorer, MIL_CONTRIBUTION, b->instances, &s.classes);
    if (s.contribution && s.classes != C) { free(s.contribution); s.contribution = NULL; s.classes = 0; }
    if (s.contribution) {
        s.margin = TOOL_NEW(double, b->instances * C);
        for (int64_t i = 0; i < b->instances; i++) {
            double sum = 0;
            const double *x = s.contribution + i * C;
            for (int64_t c = 0; c < C; c++) sum += x[c];
            for (int64_t c = 0; c < C; c++) s.margin[i * C + c] = C > 1 ? x[c] - (sum - x[c]) / (double)(C - 1) : x[c];
        }
    }
    return s;
}

TOOL_FN void instance_scores_free(instance_scores *s)
{
    free(s->score); free(s->weight); free(s->rank); free(s->contribution); free(s->margin); free(s->logits);
    memset(s, 0, sizeof *s);
}

TOOL_FN mil_scorer *instance_scorer(mil_model *model)
{
    mil_scorer_options options = mil_scorer_options_default();
    options.results = 1u << MIL_ATTENTION | 1u << MIL_WEIGHTS | 1u << MIL_RANK | 1u << MIL_CONTRIBUTION;
    mil_scorer *scorer = mil_scorer_create(model, &options);
    if (!scorer) tool_fail("%s", mil_error(mil_model_context(model)));
    return scorer;
}

// ---- the grid ----
typedef struct grid {
    double  x0, y0, step_x, step_y, edge;                  // level-0 pixels: the first patch's corner, steps, the patch's edge
    int64_t columns, rows, *cell;                          // cell [N] = row * columns + column
    char    edge_from[96], step_from[96];                  // where edge and step come from
    int64_t shared, off;                                   // patches in a cell that another has; patches more than a tenth of a step off
} grid;

TOOL_FN int compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

// The step along one axis: the most frequent distance between neighbours on the same line (equal other coordinate), the
// smaller of equals; without neighbours the smallest distance of any two. 0: one line only.
TOOL_FN double grid_step(const double *x, const double *line, int64_t n)
{
    ranked *order = TOOL_NEW(ranked, n);
    double *gap = TOOL_NEW(double, n), step = 0;
    int64_t gaps = 0, most = 0;
    double *sorted = TOOL_NEW(double, n);
    memcpy(sorted, line, (size_t)n * sizeof *sorted);
    qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
    for (int64_t i = 0; i < n; i++) order[i].value = line[i], order[i].index = i;
    qsort(order, (size_t)n, sizeof *order, compare_ranked);
    for (int64_t i = 0, j; i < n; i = j) {
        for (j = i; j < n && order[j].value == order[i].value; j++) sorted[j - i] = x[order[j].index];
        qsort(sorted, (size_t)(j - i), sizeof *sorted, compare_doubles);
        for (int64_t k = 1; k < j - i; k++) if (sorted[k] > sorted[k - 1]) gap[gaps++] = sorted[k] - sorted[k - 1];
    }
    if (gaps) qsort(gap, (size_t)gaps, sizeof *gap, compare_doubles);
    for (int64_t i = 0, j; i < gaps; i = j) {
        for (j = i; j < gaps && gap[j] == gap[i]; j++) {}
        if (j - i > most) { most = j - i; step = gap[i]; }
    }
    if (!gaps) {
        memcpy(sorted, x, (size_t)n * sizeof *sorted);
        qsort(sorted, (size_t)n, sizeof *sorted, compare_doubles);
        for (int64_t i = 1; i < n; i++) {
            const double d = sorted[i] - sorted[i - 1];
            if (d > 0 && (step == 0 || d < step)) step = d;
        }
    }
    free(order); free(gap); free(sorted);
    return step;
}

TOOL_FN double bag_meta_number(const open_bag *b, const char *path, const char *key)
{
    const char *s = b->file ? mil_tensors_meta(b->file, key) : NULL;
    double x;
    if (!s) return 0;
    if (parse_real(s, &x) && x > 0 && x <= 1e6) return x;
    tool_warn("%s: metadata %s is '%s', not a number of pixels", path, key, s);
    return 0;
}

// edge, step: the user's, 0: from the file or the coordinates. Says on stderr whatever is not as it should be.
TOOL_FN grid grid_make(const open_bag *b, const char *path, double edge, double step)
{
    grid g;
    const int64_t n = b->instances;
    memset(&g, 0, sizeof g);
    if (!b->bag.coords.data) tool_fail("%s: no coordinates (a tensor 'coords' [%lld, 2]), so there is no place to draw at", path, (long long)n);
    double *x = TOOL_NEW(double, n), *y = TOOL_NEW(double, n);
    g.x0 = g.y0 = (double)INFINITY;
    double x1 = -(double)INFINITY, y1 = -(double)INFINITY;
    for (int64_t i = 0; i < n; i++) {
        x[i] = tensor_value(&b->bag.coords, 2 * i);
        y[i] = tensor_value(&b->bag.coords, 2 * i + 1);
        if (!(fabs(x[i]) < 1e9) || !(fabs(y[i]) < 1e9)) tool_fail("%s: coords: patch %lld lies at (%g, %g)", path, (long long)i, x[i], y[i]);
        if (x[i] < g.x0) g.x0 = x[i];
        if (y[i] < g.y0) g.y0 = y[i];
        if (x[i] > x1) x1 = x[i];
        if (y[i] > y1) y1 = y[i];
    }
    g.step_x = step > 0 ? step : grid_step(x, y, n);
    g.step_y = step > 0 ? step : grid_step(y, x, n);
    if (g.step_x == 0) g.step_x = g.step_y;
    if (g.step_y == 0) g.step_y = g.step_x;
    snprintf(g.step_from, sizeof g.step_from, "%s", step > 0 ? "option --step" : "coordinates");

    const double level0 = bag_meta_number(b, path, "patch_size_level0"), size = bag_meta_number(b, path, "patch_size"), down = bag_meta_number(b, path, "downsample");
    if (edge > 0) {
        g.edge = edge;
        snprintf(g.edge_from, sizeof g.edge_from, "option --patch-size");
    } else if (level0 > 0) {
        g.edge = level0;
        snprintf(g.edge_from, sizeof g.edge_from, "the file's patch_size_level0");
    } else if (size > 0 && down > 0) {
        g.edge = size * down;
        snprintf(g.edge_from, sizeof g.edge_from, "the file's patch_size * downsample");
    } else if (g.step_x > 0) {
        g.edge = g.step_x;
        snprintf(g.edge_from, sizeof g.edge_from, "the step between patches, the file does not say");
        tool_warn("%s: the file has no patch_size_level0; the patch's edge is taken to be the step, %g pixels at level 0 (--patch-size sets it)", path, g.edge);
    } else {
        tool_fail("%s: neither the file nor its %lld patch%s say how large a patch is; use --patch-size PIXELS", path, (long long)n, n == 1 ? "" : "es");
    }
    if (g.step_x == 0) g.step_x = g.step_y = g.edge;       // a single patch
    if (g.step_x != g.step_y) tool_warn("%s: patches are %g pixels apart in x and %g in y", path, g.step_x, g.step_y);
    if (g.edge > g.step_x * 1.001) tool_warn("%s: patches overlap: edge %g, step %g; a cell shows the step", path, g.edge, g.step_x);
    if (g.edge < g.step_x * 0.999) tool_warn("%s: patches of %g pixels are %g apart; gaps are drawn as part of the patch", path, g.edge, g.step_x);
    const double columns = floor((x1 - g.x0) / g.step_x + 0.5) + 1, rows = floor((y1 - g.y0) / g.step_y + 0.5) + 1;
    if (columns * rows > 1e8 || columns > 60000 || rows > 60000)
        tool_fail("%s: a step of %g pixels makes a grid of %.0f x %.0f; set the right one with --step", path, g.step_x, columns, rows);
    g.columns = (int64_t)columns;
    g.rows = (int64_t)rows;
    g.cell = TOOL_NEW(int64_t, n);
    unsigned char *taken = TOOL_NEW(unsigned char, g.columns * g.rows);
    for (int64_t i = 0; i < n; i++) {
        const double cx = (x[i] - g.x0) / g.step_x, cy = (y[i] - g.y0) / g.step_y;
        g.cell[i] = (int64_t)floor(cy + 0.5) * g.columns + (int64_t)floor(cx + 0.5);
        g.off += fabs(cx - floor(cx + 0.5)) > 0.1 || fabs(cy - floor(cy + 0.5)) > 0.1;
        g.shared += taken[g.cell[i]];
        taken[g.cell[i]] = 1;
    }
    if (g.off) tool_warn("%s: %lld of %lld patches do not lie on the grid of step %g; they are drawn in the nearest cell", path, (long long)g.off, (long long)n, g.step_x);
    if (g.shared) tool_warn("%s: %lld patches share a cell with another; the cell shows their mean", path, (long long)g.shared);
    free(x); free(y); free(taken);
    return g;
}

TOOL_FN void grid_free(grid *g)
{
    free(g->cell);
    memset(g, 0, sizeof *g);
}

// ---- pictures ----
// One square of `zoom` pixels per cell; cells without a patch stay transparent. values [N] at stride `columns`.
// diverging: the colours' range is symmetric about 0 and ends where 2% of the cells lie outside it, else a few patches that
// carry most of a logit would leave all others white. low, high get the range.
TOOL_FN picture grid_picture(const grid *g, const double *values, int64_t columns, int64_t n, int64_t zoom, int diverging, double *low, double *high)
{
    picture p = picture_make(g->columns * zoom, g->rows * zoom);
    double *sum = TOOL_NEW(double, g->columns * g->rows);
    int64_t *count = TOOL_NEW(int64_t, g->columns * g->rows);
    *low = (double)INFINITY;
    *high = -(double)INFINITY;
    for (int64_t i = 0; i < n; i++) {
        const double v = values[i * columns];
        sum[g->cell[i]] += v;
        count[g->cell[i]]++;
    }
    for (int64_t k = 0; k < g->columns * g->rows; k++) {
        if (!count[k]) continue;
        sum[k] /= (double)count[k];
        if (sum[k] < *low) *low = sum[k];
        if (sum[k] > *high) *high = sum[k];
    }
    if (diverging) {
        double *size = TOOL_NEW(double, g->columns * g->rows), top;
        int64_t cells = 0;
        for (int64_t k = 0; k < g->columns * g->rows; k++) if (count[k]) size[cells++] = fabs(sum[k]);
        if (cells) qsort(size, (size_t)cells, sizeof *size, compare_doubles);
        top = cells ? size[(int64_t)(0.98 * (double)(cells - 1))] : 0;
        *low = -top;
        *high = top;
        free(size);
    }
    for (int64_t k = 0; k < g->columns * g->rows; k++) {
        const double t = *high > *low ? (sum[k] - *low) / (*high - *low) : 0.5;
        const int64_t x = k % g->columns * zoom, y = k / g->columns * zoom;
        if (count[k]) picture_box(&p, x, y, x + zoom, y + zoom, diverging ? colour_diverging(t) : colour_sequential(t));
    }
    free(sum);
    free(count);
    return p;
}

// ---- GeoJSON ----
// One tile per patch, as QuPath reads it: level-0 pixels less (dx, dy); every measure under its own name. Streamed.
TOOL_FN void geojson_write(mil_context *ctx, const char *path, const open_bag *b, const grid *g, const instance_scores *s, char *const *classes,
                           int64_t class_count, double dx, double dy)
{
    text t = { NULL, 0, 0 };
    tool_check(ctx, mil_writer_create(ctx, path, &tool_open_writer));
    text_add(&t, "{\"type\":\"FeatureCollection\",\"features\":[");
    for (int64_t i = 0; i < s->instances; i++) {
        const double x = tensor_value(&b->bag.coords, 2 * i) - dx, y = tensor_value(&b->bag.coords, 2 * i + 1) - dy, e = g->edge;
        const char *comma = "";
        text_add(&t, "%s\n{\"type\":\"Feature\",\"geometry\":{\"type\":\"Polygon\",\"coordinates\":[[[%.9g,%.9g],[%.9g,%.9g],[%.9g,%.9g],[%.9g,%.9g],[%.9g,%.9g]]]},"
                     "\"properties\":{\"objectType\":\"tile\",\"measurements\":{", i ? "," : "", x, y, x + e, y, x + e, y + e, x, y + e, x, y);
        for (int64_t k = 0; k < s->heads; k++) {
            char *tail = s->heads > 1 ? tool_format(" head %lld", (long long)k) : tool_string("");
            const double *const measure[] = { s->score, s->weight, s->rank };
            static const char *const names[] = { "attention score", "attention weight", "attention rank" };
            for (int m = 0; m < 3; m++) {
                if (!measure[m] || !isfinite(measure[m][i * s->heads + k])) continue;
                text_add(&t, "%s\"%s%s\":%.4g", comma, names[m], tail, measure[m][i * s->heads + k]);
                comma = ",";
            }
            free(tail);
        }
        for (int64_t c = 0; s->contribution && c < s->classes; c++) {
            char *name = tool_format("contribution %s", classes[s->classes == 1 ? class_count - 1 : c]);
            if (isfinite(s->contribution[i * s->classes + c])) {
                text_put(&t, comma, strlen(comma));
                text_json(&t, name);
                text_add(&t, ":%.4g", s->contribution[i * s->classes + c]);
                comma = ",";
            }
            free(name);
        }
        text_add(&t, "}}}");
        if (t.size > 1 << 16 || i + 1 == s->instances) {
            tool_check(ctx, mil_writer_put(tool_open_writer, t.data, t.size));
            text_free(&t);
        }
    }
    text_add(&t, "\n]}\n");
    tool_check(ctx, mil_writer_put(tool_open_writer, t.data, t.size));
    tool_check(ctx, mil_writer_commit(tool_open_writer));
    mil_writer_free(tool_open_writer);
    tool_open_writer = NULL;
    text_free(&t);
}

// ---- tables of instances ----
TOOL_FN void instances_write(mil_context *ctx, const char *path, const open_bag *b, const instance_scores *s, char *const *classes, int64_t class_count)
{
    text t = { NULL, 0, 0 };
    const int coords = b->bag.coords.data != NULL;
    static const char *const names[] = { "attention_score", "attention_weight", "attention_rank" };
    const double *const measure[] = { s->score, s->weight, s->rank };
    tool_check(ctx, mil_writer_create(ctx, path, &tool_open_writer));
    text_add(&t, "instance%s", coords ? ",x,y" : "");
    for (int m = 0; m < 3; m++)
        for (int64_t k = 0; measure[m] && k < s->heads; k++) text_add(&t, s->heads > 1 ? ",%s_%lld" : ",%s", names[m], (long long)k);
    for (int64_t c = 0; s->contribution && c < s->classes; c++) {
        char *name = tool_format("contribution_%s", classes[s->classes == 1 ? class_count - 1 : c]);
        text_put(&t, ",", 1);
        text_field(&t, name);
        free(name);
    }
    text_put(&t, "\n", 1);
    for (int64_t i = 0; i < s->instances; i++) {
        text_add(&t, "%lld", (long long)i);
        if (coords) text_add(&t, ",%.9g,%.9g", tensor_value(&b->bag.coords, 2 * i), tensor_value(&b->bag.coords, 2 * i + 1));
        for (int m = 0; m < 3; m++)
            for (int64_t k = 0; measure[m] && k < s->heads; k++) text_add(&t, ",%.6g", measure[m][i * s->heads + k]);
        for (int64_t c = 0; s->contribution && c < s->classes; c++) text_add(&t, ",%.6g", s->contribution[i * s->classes + c]);
        text_put(&t, "\n", 1);
        if (t.size > 1 << 16) {
            tool_check(ctx, mil_writer_put(tool_open_writer, t.data, t.size));
            text_free(&t);
        }
    }
    if (t.size) tool_check(ctx, mil_writer_put(tool_open_writer, t.data, t.size));
    tool_check(ctx, mil_writer_commit(tool_open_writer));
    mil_writer_free(tool_open_writer);
    tool_open_writer = NULL;
    text_free(&t);
}

// ---- the map ----
typedef struct map_choice { const char *map; int64_t klass, head; } map_choice;    // map: contribution, margin, rank, weight, score

// The column of values to draw, with its number of columns; stops when the model does not give it.
TOOL_FN const double *map_values(const instance_scores *s, const map_choice *m, const char *path, int64_t *columns, int *diverging)
{
    const int64_t c = s->classes == 1 ? 0 : m->klass;
    const double *all = strcmp(m->map, "contribution") == 0 ? s->contribution : strcmp(m->map, "margin") == 0 ? s->margin
                      : strcmp(m->map, "rank") == 0 ? s->rank : strcmp(m->map, "weight") == 0 ? s->weight : s->score;
    *diverging = all && (all == s->contribution || all == s->margin);
    if (!all) tool_fail("%s: the model gives no %s per patch%s", path, m->map,
                        s->contribution || s->rank || s->weight || s->score ? "; try another --map" : "");
    *columns = *diverging ? s->classes : s->heads;
    if (!*diverging && m->head >= s->heads) tool_fail("%s: head %lld of %lld", path, (long long)m->head, (long long)s->heads);
    return all + (*diverging ? c : m->head);
}
#endif
