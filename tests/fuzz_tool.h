// For fuzzing parts of the tool: its messages are dropped, its exits jump back, and what it had allocated is freed then.
// Include this before any header of tools/.
#ifndef FUZZ_TOOL_H
#define FUZZ_TOOL_H
#include <fcntl.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>
#include "fuzz.h"

static jmp_buf fuzz_back;
static struct fuzz_piece { struct fuzz_piece *next, *before; size_t size; } fuzz_pieces = { &fuzz_pieces, &fuzz_pieces, 0 };

static inline void *fuzz_grow(void *p, size_t size)
{
    struct fuzz_piece *old = p ? (struct fuzz_piece *)p - 1 : NULL, *piece;
    if (size > fuzz_limit) return NULL;
    if (old) { old->next->before = old->before; old->before->next = old->next; }
    piece = (struct fuzz_piece *)realloc(old, sizeof *piece + size);
    if (!piece) abort();
    if (!old) memset(piece + 1, 0, size);
    piece->size = size;
    piece->next = fuzz_pieces.next;
    piece->before = &fuzz_pieces;
    piece->next->before = fuzz_pieces.next = piece;
    return piece + 1;
}

static inline void fuzz_release(void *p)
{
    if (!p) return;
    struct fuzz_piece *piece = (struct fuzz_piece *)p - 1;
    piece->next->before = piece->before;
    piece->before->next = piece->next;
    free(piece);
}

static inline void fuzz_release_all(void) { while (fuzz_pieces.next != &fuzz_pieces) fuzz_release(fuzz_pieces.next + 1); }

static inline __attribute__((noreturn)) void fuzz_exit(int code)
{
    (void)code;
    longjmp(fuzz_back, 1);
}

// The input as a file; the same one each time.
static inline const char *fuzz_file(const uint8_t *data, size_t size)
{
    static char path[64];
    static int fd = -1;
    if (fd < 0) {
        snprintf(path, sizeof path, "%s/mil_fuzz_%ld", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (long)getpid());
        fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
        FUZZ_CHECK(fd >= 0);
    }
    FUZZ_CHECK(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == (ssize_t)size);
    return path;
}

static inline int fuzz_silent(void) { return 0; }

#define calloc(count, size) ((size) && (count) > SIZE_MAX / (size) ? NULL : fuzz_grow(NULL, (size_t)(count) * (size)))
#define realloc(p, size) fuzz_grow(p, size)
#define free(p) fuzz_release(p)
#define exit(code) fuzz_exit(code)
#define fputs(text, file) ((void)(text), fuzz_silent())
#define vfprintf(file, format, list) ((void)(format), fuzz_silent())
#define fputc(c, file) fuzz_silent()
#define printf(...) fuzz_silent()

#endif
