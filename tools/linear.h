// The baseline that every MIL model has to beat: ridge logistic regression on the mean of a bag's features.
#ifndef TOOL_LINEAR_H
#define TOOL_LINEAR_H
#include "data.h"

typedef struct linear { int64_t dim; double *mean, *factor, *w; } linear;          // w [dim + 1], the last is the intercept

// Means of the bags' features, [count of the set, dim]: computed once, for all folds.
TOOL_FN double *bag_means(const data_set *d)
{
    double *x = TOOL_NEW(double, d->count * d->dim);
    for (int64_t i = 0; i < d->count; i++) {
        open_bag b = data_bag(d, i, NULL);
        for (int64_t k = 0; k < b.instances; k++)
            for (int64_t c = 0; c < d->dim; c++) x[i * d->dim + c] += tensor_value(&b.bag.features, k * d->dim + c) / (double)b.instances;
        bag_close(&b);
    }
    return x;
}

// Solves A x = b for symmetric positive A [n, n], in place (Cholesky).
TOOL_FN void solve(double *A, double *b, int64_t n)
{
    for (int64_t j = 0; j < n; j++) {
        for (int64_t i = j; i < n; i++) {
            double sum = A[i * n + j];
            for (int64_t k = 0; k < j; k++) sum -= A[i * n + k] * A[j * n + k];
            A[i * n + j] = i == j ? sqrt(sum > 1e-12 ? sum : 1e-12) : sum / A[j * n + j];
        }
    }
    for (int64_t i = 0; i < n; i++) {
        for (int64_t k = 0; k < i; k++) b[i] -= A[i * n + k] * b[k];
        b[i] /= A[i * n + i];
    }
    for (int64_t i = n - 1; i >= 0; i--) {
        for (int64_t k = i + 1; k < n; k++) b[i] -= A[k * n + i] * b[k];
        b[i] /= A[i * n + i];
    }
}

TOOL_FN double linear_logit(const linear *m, const double *x)
{
    double z = m->w[m->dim];
    for (int64_t c = 0; c < m->dim; c++) z += m->w[c] * (x[c] - m->mean[c]) * m->factor[c];
    return z;
}

// Minimises sum log-loss + l2/2 |w|^2 over standardised rows x[which[k]] by Newton steps. labels 0 or 1 by bag.
TOOL_FN linear linear_fit(const double *x, int64_t dim, const int64_t *which, int64_t count, const data_set *d, double l2)
{
    const int64_t n = dim + 1;
    linear m = { dim, TOOL_NEW(double, dim), TOOL_NEW(double, dim), TOOL_NEW(double, n) };
    double *H = TOOL_NEW(double, n * n), *g = TOOL_NEW(double, n), *row = TOOL_NEW(double, n);
    for (int64_t c = 0; c < dim; c++) {
        double sum = 0, square = 0;
        for (int64_t k = 0; k < count; k++) sum += x[which[k] * dim + c] / (double)count;
        for (int64_t k = 0; k < count; k++) square += pow(x[which[k] * dim + c] - sum, 2) / (double)count;
        m.mean[c] = sum;
        m.factor[c] = square > 1e-24 ? 1 / sqrt(square) : 1;
    }
    for (int step = 0; step < 25; step++) {
        double moved = 0;
        memset(H, 0, (size_t)(n * n) * sizeof *H);
        for (int64_t c = 0; c < n; c++) {
            g[c] = c < dim ? -l2 * m.w[c] : 0;
            H[c * n + c] = c < dim ? l2 : 1e-9;
        }
        for (int64_t k = 0; k < count; k++) {
            const double p = 1 / (1 + exp(-linear_logit(&m, x + which[k] * dim))), v = p * (1 - p);
            for (int64_t c = 0; c < n; c++) row[c] = c < dim ? (x[which[k] * dim + c] - m.mean[c]) * m.factor[c] : 1;
            for (int64_t c = 0; c < n; c++) {
                g[c] += ((double)d->bag[which[k]].label - p) * row[c];
                for (int64_t e = 0; e <= c; e++) H[c * n + e] += v * row[c] * row[e];
            }
        }
        solve(H, g, n);
        for (int64_t c = 0; c < n; c++) {
            m.w[c] += g[c];
            moved += fabs(g[c]);
        }
        if (moved < 1e-9 * (double)n) break;
    }
    free(H); free(g); free(row);
    return m;
}

TOOL_FN void linear_free(linear *m)
{
    free(m->mean); free(m->factor); free(m->w);
}
#endif
