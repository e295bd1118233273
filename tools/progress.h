// How far a long job is: a bar with rate and remaining time that overwrites itself on a terminal; elsewhere plain lines.
#ifndef TOOL_PROGRESS_H
#define TOOL_PROGRESS_H
#include <time.h>
#include <unistd.h>
#include "text.h"

typedef struct progress {
    double  started, shown;
    int64_t done, begun, total;                            // units; begun: done before this process started
    int     terminal, quiet, width;                        // quiet: no line per epoch
    const char *unit;
} progress;

TOOL_FN double seconds_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

TOOL_FN progress progress_start(int64_t total, const char *unit)
{
    progress p;
    memset(&p, 0, sizeof p);
    p.started = seconds_now();
    p.total = total;
    p.unit = unit;
    p.terminal = isatty(2);
    return p;
}

TOOL_FN void progress_clear(progress *p)
{
    if (p->width) fprintf(stderr, "\r%*s\r", p->width, "");
    p->width = 0;
}

TOOL_FN void progress_add(progress *p, int64_t units, const char *what)
{
    const double now = seconds_now();
    p->done += units;
    if (!p->terminal || now - p->shown < 0.1) return;
    p->shown = now;
    const double share = p->total ? (double)p->done / (double)p->total : 1, spent = now - p->started;
    const double rate = spent > 0 ? (double)(p->done - p->begun) / spent : 0;
    const int filled = (int)(share * 20);
    char bar[21], left[32] = "";
    for (int k = 0; k < 20; k++) bar[k] = k < filled ? '=' : k == filled ? '>' : ' ';
    bar[20] = 0;
    if (rate > 0) {
        const int64_t s = (int64_t)((double)(p->total - p->done) / rate + 0.5);
        snprintf(left, sizeof left, s >= 3600 ? "%lld:%02lld:%02lld left" : "%.0lld%lld:%02lld left",
                 s >= 3600 ? (long long)(s / 3600) : 0LL, (long long)(s % 3600 / 60), (long long)(s % 60));
    }
    const int n = fprintf(stderr, "\r%.26s [%s] %3d%%  %.1f %s/s  %s", what, bar, (int)(share * 100), rate, p->unit, left) - 1;
    if (n < p->width) fprintf(stderr, "%*s", p->width - n, "");
    p->width = n > p->width ? n : p->width;
    fflush(stderr);
}

// A line that stays.
TOOL_FN MIL_PRINTF(2, 3) void progress_say(progress *p, const char *format, ...)
{
    va_list list;
    progress_clear(p);
    fflush(stderr);
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    putchar('\n');
    fflush(stdout);
}
#endif
