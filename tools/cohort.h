// A synthetic cohort of slides, a function of its seed: tissue on a grid of patches, features per patch, tumour in half of the
// slides. What makes it like the real thing:
//   - tumour is a few percent of a slide, and its features overlap with those of other tissue and of benign mimics
//   - what a slide is made of differs from slide to slide, far more than the tumour changes the slide's mean
//   - each scanner and each stain shifts all features of a slide
//   - slides of one patient share their stain; patches lie at level-0 coordinates, not in raster order
#ifndef TOOL_COHORT_H
#define TOOL_COHORT_H
#include "data.h"
#include "picture.h"

enum { COHORT_DIM = 64, COHORT_TISSUES = 5, COHORT_COLUMNS = 40, COHORT_ROWS = 30, COHORT_EDGE = 512 };
// What a patch is: tissue 0..4, else
enum { COHORT_GLASS = -1, COHORT_MIMIC = 5, COHORT_TUMOUR = 6 };

typedef struct cohort_slide { int kind[COHORT_ROWS * COHORT_COLUMNS], patches, tumour_patches; } cohort_slide;

// Smooth noise with values about -1..1: random values on a coarse lattice, cubic in between, two octaves.
TOOL_FN double field(uint64_t seed, uint64_t stream, double x, double y)
{
    double sum = 0, weight = 1;
    for (int octave = 0; octave < 2; octave++, x *= 2.3, y *= 2.3, weight *= 0.45) {
        const double fx = floor(x), fy = floor(y), u = x - fx, v = y - fy, su = u * u * (3 - 2 * u), sv = v * v * (3 - 2 * v);
        double corner[4];
        for (int k = 0; k < 4; k++)
            corner[k] = 2 * random_uniform(seed, stream + (uint64_t)octave, (uint64_t)((int64_t)fx + 64 + (k & 1)) * 4096 + (uint64_t)((int64_t)fy + 64 + (k >> 1))) - 1;
        sum += weight * ((corner[0] * (1 - su) + corner[1] * su) * (1 - sv) + (corner[2] * (1 - su) + corner[3] * su) * sv);
    }
    return sum;
}

// Round regions of one kind with ragged borders, about `wanted` patches, on tissue.
TOOL_FN void cohort_region(cohort_slide *s, uint64_t seed, uint64_t stream, int kind, int wanted, int regions)
{
    for (int r = 0, done = 0; r < regions * 8 && done < wanted; r++) {
        const double cx = COHORT_COLUMNS * (0.15 + 0.7 * random_uniform(seed, stream, (uint64_t)(3 * r)));
        const double cy = COHORT_ROWS * (0.15 + 0.7 * random_uniform(seed, stream, (uint64_t)(3 * r + 1)));
        const double radius = sqrt((double)wanted / (3.14159 * regions)) * (0.8 + 0.5 * random_uniform(seed, stream, (uint64_t)(3 * r + 2)));
        for (int y = 0; y < COHORT_ROWS; y++)
            for (int x = 0; x < COHORT_COLUMNS; x++) {
                int *k = &s->kind[y * COHORT_COLUMNS + x];
                const double distance = hypot(x - cx, y - cy) + 1.2 * field(seed, stream + 7, x * 0.5, y * 0.5);
                if (*k < 0 || *k >= COHORT_TISSUES || distance > radius || done >= wanted) continue;
                *k = kind;
                done++;
            }
    }
}

TOOL_FN void cohort_draw(cohort_slide *s, uint64_t seed, int64_t slide, int tumour)
{
    const uint64_t base = (uint64_t)slide * 1000 + 100;
    double taste[COHORT_TISSUES];
    memset(s, 0, sizeof *s);
    for (int t = 0; t < COHORT_TISSUES; t++) taste[t] = 0.55 * random_normal(seed, base, (uint64_t)t);
    for (int y = 0; y < COHORT_ROWS; y++)
        for (int x = 0; x < COHORT_COLUMNS; x++) {
            const double dx = (x + 0.5) / COHORT_COLUMNS - 0.5, dy = (y + 0.5) / COHORT_ROWS - 0.5;
            int *k = &s->kind[y * COHORT_COLUMNS + x];
            double best = -1e9;
            *k = COHORT_GLASS;
            if (field(seed, base + 10, x * 0.13, y * 0.13) * 0.5 + 0.62 < 3.6 * (dx * dx + dy * dy) + 0.35) continue;
            for (int t = 0; t < COHORT_TISSUES; t++) {
                const double f = taste[t] + field(seed, base + 20 + (uint64_t)(3 * t), x * 0.17, y * 0.17);
                if (f > best) { best = f; *k = t; }
            }
            s->patches++;
        }
    const int mimics = 1 + (int)(random_uniform(seed, base + 60, 0) * 0.10 * s->patches);
    cohort_region(s, seed, base + 62, COHORT_MIMIC, mimics, 2);
    if (tumour) {
        const double share = 0.015 + 0.10 * pow(random_uniform(seed, base + 70, 0), 2);
        cohort_region(s, seed, base + 72, COHORT_TUMOUR, 4 + (int)(share * s->patches), 1 + (int)(random_uniform(seed, base + 70, 1) * 3));
    }
    for (int k = 0; k < COHORT_ROWS * COHORT_COLUMNS; k++) s->tumour_patches += s->kind[k] == COHORT_TUMOUR;
}

// The feature d of patch `cell` of a slide. Directions and means are drawn once per cohort, shifts per scanner, patient and slide.
TOOL_FN double cohort_feature(uint64_t seed, const cohort_slide *s, int64_t slide, int64_t patient, int scanner, int cell, int d)
{
    const uint64_t base = (uint64_t)slide * 1000 + 500, D = (uint64_t)d;
    const int kind = s->kind[cell], tissue = kind < COHORT_TISSUES ? kind : 1;     // tumour and mimics grow out of epithelium
    const double scale = 1 / sqrt((double)COHORT_DIM);
    double x = 0.9 * random_normal(seed, 1, (uint64_t)tissue * COHORT_DIM + D);
    const double strength = 1 + 0.3 * random_normal(seed, base, (uint64_t)cell);   // some patches show it more than others
    if (kind == COHORT_TUMOUR) x += 4.5 * strength * scale * random_normal(seed, 2, D);
    if (kind == COHORT_MIMIC) x += strength * scale * (2.9 * random_normal(seed, 2, D) + 2.6 * random_normal(seed, 3, D));
    x += 0.25 * random_normal(seed, 4, (uint64_t)scanner * COHORT_DIM + D);
    x += 0.20 * random_normal(seed, 5, (uint64_t)patient * COHORT_DIM + D);
    x *= 1 + 0.08 * random_normal(seed, base + 1, 0);
    return x + random_normal(seed, base + 2, (uint64_t)cell * COHORT_DIM + D);
}

// Writes the cohort: folder/labels.csv and a .safetensors per slide.
TOOL_FN void cohort_write(mil_context *ctx, const char *folder, int64_t slides, uint64_t seed, int64_t *patches, int64_t *tumour_patches)
{
    text labels = { NULL, 0, 0 };
    float *x = TOOL_NEW(float, COHORT_ROWS * COHORT_COLUMNS * COHORT_DIM);
    int64_t *cells = TOOL_NEW(int64_t, COHORT_ROWS * COHORT_COLUMNS), *coords = TOOL_NEW(int64_t, 2 * COHORT_ROWS * COHORT_COLUMNS);
    unsigned char *truth = TOOL_NEW(unsigned char, COHORT_ROWS * COHORT_COLUMNS);
    *patches = *tumour_patches = 0;
    text_add(&labels, "bag,label,patient,scanner\n");
    for (int64_t slide = 0; slide < slides; slide++) {
        const int64_t patient = slide * 4 / 5;             // every fifth patient has two slides
        const int tumour = (int)(random_bits(seed, 6, (uint64_t)patient) & 1), scanner = (int)(random_bits(seed, 7, (uint64_t)patient) % 3);
        cohort_slide s;
        int64_t n = 0;
        cohort_draw(&s, seed, slide, tumour);
        for (int64_t k = 0; k < COHORT_ROWS * COHORT_COLUMNS; k++) if (s.kind[k] != COHORT_GLASS) cells[n++] = k;
        random_shuffle(seed, (uint64_t)slide * 1000 + 503, cells, n);
        for (int64_t i = 0; i < n; i++) {
            coords[2 * i] = 3072 + cells[i] % COHORT_COLUMNS * COHORT_EDGE;
            coords[2 * i + 1] = 2048 + cells[i] / COHORT_COLUMNS * COHORT_EDGE;
            truth[i] = s.kind[cells[i]] == COHORT_TUMOUR;
            for (int d = 0; d < COHORT_DIM; d++) x[i * COHORT_DIM + d] = (float)cohort_feature(seed, &s, slide, patient, scanner, (int)cells[i], d);
        }
        const int64_t pair[2] = { n, 2 };
        const mil_tensor tensors[3] = { mil_tensor_matrix(x, MIL_F32, n, COHORT_DIM), mil_tensor_make(coords, MIL_I64, 2, pair), mil_tensor_make(truth, MIL_U8, 1, pair) };
        const char *const names[3] = { "features", "coords", "instance_labels" };
        const mil_meta meta[] = { { "patch_size_level0", "512" }, { "note", "synthetic" } };
        char *leaf = tool_format("slide_%03lld.safetensors", (long long)slide), *path = path_join(folder, leaf);
        tool_check(ctx, mil_tensors_write(ctx, path, tensors, names, 3, meta, 2));
        text_add(&labels, "slide_%03lld,%s,patient_%03lld,%c\n", (long long)slide, tumour ? "tumour" : "normal", (long long)patient, 'A' + scanner);
        free(leaf);
        free(path);
        *patches += n;
        *tumour_patches += s.tumour_patches;
    }
    char *path = path_join(folder, "labels.csv");
    file_write(ctx, path, &labels);
    free(path);
    text_free(&labels);
    free(x); free(cells); free(coords); free(truth);
}
#endif
