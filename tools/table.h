// Tables as people have them: comma, semicolon or tab, quoted fields, byte order mark, any line end.
#ifndef TOOL_TABLE_H
#define TOOL_TABLE_H
#include "text.h"

typedef struct table {
    char   *path, *bytes;
    char ***row;                                           // row[0] is the header; each has `columns` fields
    int64_t *line;                                         // where a row begins in the file, from 1
    int64_t rows, columns;                                 // rows with the header
    char    separator;
} table;

// The separator is the one of , ; and tab that the first line has most of, outside quotes.
TOOL_FN char table_separator(const char *p, const char *end)
{
    const char candidates[] = ",;\t";
    int64_t count[3] = { 0, 0, 0 };
    int quoted = 0, best = 0;
    for (; p < end && (quoted || (*p != '\n' && *p != '\r')); p++) {
        if (*p == '"') quoted = !quoted;
        for (int k = 0; k < 3; k++) count[k] += !quoted && *p == candidates[k];
    }
    for (int k = 1; k < 3; k++) if (count[k] > count[best]) best = k;
    return candidates[best];
}

// One field, unquoted and trimmed in place; *p goes to what follows it, *after gets that byte (a 0 may be written over it).
// Returns NULL for a quote that is never closed.
TOOL_FN char *table_field(char **p, char *end, char separator, int64_t *line, char *after)
{
    while (*p < end && **p == ' ') ++*p;
    char *field = *p, *out = field;
    if (*p < end && **p == '"') {
        for (++*p; ; ++*p) {
            if (*p >= end) return NULL;
            if (**p == '"' && *p + 1 < end && (*p)[1] == '"') ++*p;
            else if (**p == '"') break;
            *line += **p == '\n';
            *out++ = **p;
        }
        ++*p;
        while (*p < end && **p == ' ') ++*p;
    } else {
        while (*p < end && **p != separator && **p != '\n' && **p != '\r') *out++ = *(*p)++;
        while (out > field && out[-1] == ' ') out--;
    }
    *after = *p < end ? **p : '\n';
    *out = 0;
    return field;
}

TOOL_FN void table_free(table *t)
{
    for (int64_t i = 0; i < t->rows; i++) free(t->row[i]);
    free(t->row);
    free(t->line);
    free(t->bytes);
    free(t->path);
    memset(t, 0, sizeof *t);
}

TOOL_FN table table_open(mil_context *ctx, const char *path)
{
    table t;
    mil_file *file;
    memset(&t, 0, sizeof t);
    tool_check(ctx, mil_file_open(ctx, path, (size_t)1 << 30, MIL_FILE_READ, &file));
    const size_t size = mil_file_size(file);
    t.path = tool_string(path);
    t.bytes = tool_copy(size ? (const char *)mil_file_data(file) : "", size);
    mil_file_free(file);
    char *p = t.bytes, *end = p + size;
    if (size >= 2 && ((p[0] == '\xff' && p[1] == '\xfe') || (p[0] == '\xfe' && p[1] == '\xff')))
        tool_fail("%s: the text is UTF-16; save it as UTF-8", path);
    if (size >= 3 && memcmp(p, "\xef\xbb\xbf", 3) == 0) p += 3;
    if (memchr(p, 0, (size_t)(end - p))) tool_fail("%s: not a text: it has a zero byte", path);
    int64_t first = 1;
    for (; p < end && (*p == '\n' || *p == '\r'); first++) p += *p == '\r' && p + 1 < end && p[1] == '\n' ? 2 : 1;
    if (end - p >= 5 && strncasecmp(p, "sep=", 4) == 0 && strchr(",;\t|", p[4]) && (end - p == 5 || p[5] == '\n' || p[5] == '\r')) {        // as Excel writes it
        t.separator = p[4];
        p += 5;
    } else {
        t.separator = table_separator(p, end);
    }
    for (int64_t line = first; p < end; line++) {
        char **fields = NULL;
        int64_t count = 0, start = line;
        if (*p == '\n' || *p == '\r') {                    // an empty line
            p += *p == '\r' && p + 1 < end && p[1] == '\n' ? 2 : 1;
            continue;
        }
        for (int more = 1; more;) {
            fields = (char **)tool_grow(fields, (size_t)count + 1, sizeof *fields);
            char after;
            char *field = table_field(&p, end, t.separator, &line, &after);
            if (!field) tool_fail("%s: line %lld: a quote that is never closed", path, (long long)start);
            if (after != t.separator && after != '\n' && after != '\r')
                tool_fail("%s: line %lld: text follows a closing quote", path, (long long)start);
            fields[count++] = field;
            more = after == t.separator;
            if (p < end) p++;
            if (after == '\r' && p < end && *p == '\n') p++;
        }
        int blank = 1;
        for (int64_t k = 0; k < count; k++) blank &= !fields[k][0];
        if (blank) { free(fields); continue; }
        if (t.rows == 0) t.columns = count;
        for (int64_t k = t.columns; k < count; k++)
            if (fields[k][0]) tool_fail("%s: line %lld has %lld fields, the header has %lld", path, (long long)start,
                                        (long long)count, (long long)t.columns);
        fields = (char **)tool_grow(fields, (size_t)(t.columns > count ? t.columns : count), sizeof *fields);
        for (int64_t k = count; k < t.columns; k++) fields[k] = t.bytes + size;        // short lines: empty fields
        t.row = (char ***)tool_grow(t.row, (size_t)t.rows + 1, sizeof *t.row);
        t.line = (int64_t *)tool_grow(t.line, (size_t)t.rows + 1, sizeof *t.line);
        t.line[t.rows] = start;
        t.row[t.rows++] = fields;
    }
    if (t.rows == 0) tool_fail("%s: the table is empty", path);
    return t;
}

// The first column with one of the names (separated by '|', any case); -1 when there is none.
TOOL_FN int64_t table_column(const table *t, const char *names)
{
    for (const char *p = names; *p;) {
        const size_t n = strcspn(p, "|");
        for (int64_t k = 0; k < t->columns; k++)
            if (strlen(t->row[0][k]) == n && strncasecmp(t->row[0][k], p, n) == 0) return k;
        p += n + (p[n] == '|');
    }
    return -1;
}
#endif
