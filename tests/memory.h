// Contexts for tests: an allocator that counts, and fails when told; any number of threads; a host's own parallel loop.
#ifndef MEMORY_H
#define MEMORY_H
#include <stdlib.h>

typedef struct memory {
    long   calls;                                          // allocations so far
    long   fail_at;                                        // this one fails, -1: none
    int    fail_after;                                     // and all that follow
    size_t bytes;                                          // held now
} memory;

static void *memory_reallocate(void *user, void *block, size_t old_size, size_t new_size)
{
    memory *m = (memory *)user;
    if (new_size == 0) {
        if (block) m->bytes -= old_size;
        free(block);
        return NULL;
    }
    const long call = m->calls++;
    if (m->fail_at >= 0 && (call == m->fail_at || (m->fail_after && call > m->fail_at))) return NULL;
    if (new_size > (size_t)1 << 30) return NULL;           // sanitizers stop at what malloc refuses
    void *p = realloc(block, new_size);
    if (p) m->bytes += new_size - (block ? old_size : 0);
    return p;
}

// Calls the tasks backwards, on the caller's thread: an order that a pool hardly ever has.
static void memory_run(void *user, int64_t count, void (*task)(void *arg, int64_t index), void *arg)
{
    ++*(long *)user;
    for (int64_t i = count; i-- > 0; ) task(arg, i);
}

// m NULL: the library's allocator. hosted NULL: a pool of `threads`; else counts the loops that the host was asked for.
static mil_context *memory_context(memory *m, int threads, long *hosted)
{
    mil_context *ctx = NULL;
    mil_context_options o = mil_context_options_default();
    o.threads = threads;
    if (m) {
        m->calls = 0;
        m->bytes = 0;
        m->fail_at = -1;
        m->fail_after = 0;
        o.allocator.reallocate = memory_reallocate;
        o.allocator.user = m;
    }
    if (hosted) {
        o.parallel.run = memory_run;
        o.parallel.user = hosted;
        o.parallel.threads = threads;
    }
    CHECK(mil_context_create(&ctx, &o) == MIL_OK);
    return ctx;
}

// The same whole numbers on every machine, 0..n-1.
static inline int memory_chance(uint64_t *state, int n)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (int)((*state >> 33) % (uint64_t)n);
}

// The same numbers on every machine, about uniform in -1..1.
static inline double memory_noise(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return (double)(*state >> 11) * (2.0 / 9007199254740992.0) - 1.0;
}

#endif
