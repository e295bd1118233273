// Bags of the algorithmic unit tests of Raff and Holt ("Reproducibility in Multiple Instance Learning: A Case For Algorithmic Unit
// Tests", NeurIPS 2023), as torchmil generates them. A bag is positive because of what is in it. In training, negative bags also hold
// a "poison" instance, or positive bags fewer of what makes them positive; in the test set that is turned round. A model that scores
// bags by what is absent, which no positive instance can explain, is then worse than chance.
#ifndef TOOL_UNIT_BAGS_H
#define TOOL_UNIT_BAGS_H
#include "text.h"

typedef enum unit_kind { UNIT_SC_STANDARD, UNIT_MC_STANDARD, UNIT_FALSE_FREQUENCY, UNIT_COUNT } unit_kind;
static const char *const unit_names[UNIT_COUNT] = { "sc_standard", "mc_standard", "false_frequency" };

// Where the draws come from: integers in low..high in order, then a row of noise per instance. Recorded draws win over the seed.
typedef struct unit_draws { uint64_t seed, count; double (*recorded)(void *user, int noise, int64_t index); void *user; } unit_draws;

typedef struct unit_bags {
    int64_t  D, bags, rows;
    double  *x;                                            // [rows, D]
    double  *y_inst;                                       // [rows] 1: makes a bag positive; -1: poison
    int64_t *y, *sizes;                                    // [bags]
} unit_bags;

TOOL_FN int64_t unit_int(unit_draws *r, int64_t low, int64_t high)
{
    const uint64_t k = r->count++;
    if (r->recorded) return (int64_t)r->recorded(r->user, 0, (int64_t)k);
    return low + (int64_t)(random_bits(r->seed, 1, k) % (uint64_t)(high - low + 1));
}

TOOL_FN void unit_rows(unit_bags *u, unit_draws *r, int64_t count, double mean, double deviation, double label)
{
    u->x = (double *)tool_grow(u->x, (size_t)((u->rows + count) * u->D), sizeof *u->x);
    u->y_inst = (double *)tool_grow(u->y_inst, (size_t)(u->rows + count), sizeof *u->y_inst);
    for (int64_t i = 0; i < count; i++, u->rows++) {
        for (int64_t d = 0; d < u->D; d++) {
            const int64_t k = u->rows * u->D + d;
            u->x[k] = mean + deviation * (r->recorded ? r->recorded(r->user, 1, k) : random_normal(r->seed, 2, (uint64_t)k));
        }
        u->y_inst[u->rows] = label;
    }
}

TOOL_FN unit_bags unit_make(unit_kind kind, int64_t D, int64_t bags, int64_t B, double positive_share, int train, unit_draws *r)
{
    unit_bags u = { D, bags, 0, NULL, NULL, TOOL_NEW(int64_t, bags), TOOL_NEW(int64_t, bags) };
    const int64_t positives = (int64_t)((double)bags * positive_share);
    for (int64_t b = 0; b < bags; b++) {
        const int64_t first = u.rows;
        u.y[b] = b < positives;
        if (kind != UNIT_FALSE_FREQUENCY && (u.y[b] ? !train : train)) unit_rows(&u, r, 1, -10, 0.1, -1);
        if (kind == UNIT_SC_STANDARD) {
            const int64_t p = u.y[b] ? unit_int(r, 1, 3) : 0;
            for (int64_t k = 0; k < p; k++) {
                if (unit_int(r, 0, 1) == 0) unit_rows(&u, r, 1, 0, 3, 1);
                else unit_rows(&u, r, 1, 1, 1, 1);
            }
            unit_rows(&u, r, B, 0, 1, 0);
        } else if (kind == UNIT_MC_STANDARD) {
            if (u.y[b]) {
                const int64_t p = unit_int(r, 1, 3);
                for (int64_t k = 0; k < 2 * p; k++) unit_rows(&u, r, 1, k % 2 ? 3 : 2, 0.1, 1);
            } else {
                unit_rows(&u, r, 1, unit_int(r, 0, 1) ? 3 : 2, 0.1, 1);
            }
            unit_rows(&u, r, unit_int(r, 1, 9), 0, 1, 0);
        } else {
            const int64_t twos = u.y[b] ? unit_int(r, 1, 1) : train ? unit_int(r, 1, 1) : unit_int(r, 35, 44);
            const int64_t threes = u.y[b] ? unit_int(r, 1, 1) : unit_int(r, 0, 0);
            unit_rows(&u, r, twos, 2, 0.1, 1);
            unit_rows(&u, r, threes, 3, 0.1, 1);
            unit_rows(&u, r, unit_int(r, 1, 9), 0, 1, 0);
        }
        u.sizes[b] = u.rows - first;
    }
    return u;
}

TOOL_FN void unit_free(unit_bags *u)
{
    free(u->x); free(u->y_inst); free(u->y); free(u->sizes);
    memset(u, 0, sizeof *u);
}
#endif
