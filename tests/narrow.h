// Small models of any architecture, and their weights.
#ifndef NARROW_H
#define NARROW_H
#include <stdlib.h>

enum { NARROW_WEIGHTS = 1 << 18 };                         // numbers in such a model, at most

// Its width in, and 16 for each other whole number whose default is larger.
static void narrow_options(const mil_architecture *a, int in_dim, char *text, size_t size)
{
    int at = snprintf(text, size, "in_dim=%d", in_dim);
    for (int k = 0; k < a->option_count; k++)
        if (a->options[k].type == MIL_OPTION_INT && strcmp(a->options[k].name, "in_dim") && atoi(a->options[k].value) > 16)
            at += snprintf(text + at, size - (size_t)at, " %s=16", a->options[k].name);
}

// Parameters and buffers of real numbers; returns how many.
static int64_t narrow_weights(const mil_model *m, mil_real dst[NARROW_WEIGHTS])
{
    int64_t count = 0;
    for (int64_t i = 0; i < mil_model_param_count(m); i++) {
        const mil_param *p = mil_model_param(m, i);
        if (p->dtype != MIL_REAL_DTYPE || !CHECK(count + p->count <= NARROW_WEIGHTS)) continue;
        memcpy(dst + count, p->data, (size_t)p->count * sizeof *dst);
        count += p->count;
    }
    return count;
}

#endif
