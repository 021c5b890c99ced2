/* Copies many spans of memory in one call: no Python, no torch, plain C11 and POSIX threads.
 *
 * Long spans are written with non-temporal stores where the processor has them. They do not first read the lines that
 * they overwrite, and took three quarters of the time of memcpy.
 *
 * With several threads the spans, laid end to end, are cut into pieces of one size, and every thread takes the next
 * piece when it is done with its last. A helper that the scheduler does not run takes none, so nobody waits for it.
 * Helpers live for one call. There is nothing to look after at a fork, and starting one costs 20 microseconds.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PIECE_BYTES ((uint64_t)1 << 20)
#define STREAM_FROM_BYTES ((size_t)8192) /* shorter spans are faster, or no slower, with memcpy */

#if defined(__x86_64__)
#include <immintrin.h>

#define BLOCK_BYTES ((size_t)128)

/* The target is aligned to BLOCK_BYTES, the length a multiple of it. */
static void stream_sse2(char *target, const char *source, size_t length)
{
    for (size_t at = 0; at < length; at += BLOCK_BYTES) {
        __m128i block[BLOCK_BYTES / 16];
        for (size_t i = 0; i < BLOCK_BYTES / 16; i++)
            block[i] = _mm_loadu_si128((const __m128i *)(source + at) + i);
        for (size_t i = 0; i < BLOCK_BYTES / 16; i++)
            _mm_stream_si128((__m128i *)(target + at) + i, block[i]);
    }
}

__attribute__((target("avx2"))) static void stream_avx2(char *target, const char *source, size_t length)
{
    for (size_t at = 0; at < length; at += BLOCK_BYTES) {
        __m256i block[BLOCK_BYTES / 32];
        for (size_t i = 0; i < BLOCK_BYTES / 32; i++)
            block[i] = _mm256_loadu_si256((const __m256i *)(source + at) + i);
        for (size_t i = 0; i < BLOCK_BYTES / 32; i++)
            _mm256_stream_si256((__m256i *)(target + at) + i, block[i]);
    }
}

static void copy_span(char *target, const char *source, size_t length)
{
    if (length >= STREAM_FROM_BYTES) {
        size_t head = (size_t)-(uintptr_t)target % BLOCK_BYTES;
        size_t middle = (length - head) / BLOCK_BYTES * BLOCK_BYTES;
        memcpy(target, source, head);
        if (__builtin_cpu_supports("avx2"))
            stream_avx2(target + head, source + head, middle);
        else
            stream_sse2(target + head, source + head, middle);
        target += head + middle;
        source += head + middle;
        length -= head + middle;
    }
    memcpy(target, source, length);
}

/* Non-temporal stores are ordered with nothing else; after this they are visible to every other thread. */
static void finish_stores(void)
{
    _mm_sfence();
}

#else

static void copy_span(char *target, const char *source, size_t length)
{
    memcpy(target, source, length);
}

static void finish_stores(void)
{
}

#endif

struct spans {
    const uint64_t *targets;
    const uint64_t *sources;
    const uint64_t *lengths;
    size_t count;
};

/* A place in the spans laid end to end. */
struct place {
    size_t span;
    uint64_t offset;
};

struct job {
    struct spans spans;
    atomic_size_t next;
    atomic_size_t done;
    size_t pieces;
    atomic_int holders; /* the caller and its helpers; the last one frees the job */
    pthread_mutex_t lock;
    pthread_cond_t all_done;
    struct place starts[]; /* one more than there are pieces */
};

static void copy_range(const struct spans *spans, struct place from, struct place to)
{
    for (size_t i = from.span; i < spans->count && i <= to.span; i++) {
        uint64_t start = i == from.span ? from.offset : 0;
        uint64_t end = i == to.span ? to.offset : spans->lengths[i];
        copy_span((char *)(uintptr_t)spans->targets[i] + start, (const char *)(uintptr_t)spans->sources[i] + start,
                  (size_t)(end - start));
    }
    finish_stores();
}

static void work(struct job *job)
{
    size_t piece;
    while ((piece = atomic_fetch_add(&job->next, 1)) < job->pieces) {
        copy_range(&job->spans, job->starts[piece], job->starts[piece + 1]);
        if (atomic_fetch_add(&job->done, 1) + 1 == job->pieces) {
            pthread_mutex_lock(&job->lock);
            pthread_cond_signal(&job->all_done);
            pthread_mutex_unlock(&job->lock);
        }
    }
}

static void let_go(struct job *job)
{
    if (atomic_fetch_sub(&job->holders, 1) == 1) {
        pthread_cond_destroy(&job->all_done);
        pthread_mutex_destroy(&job->lock);
        free(job);
    }
}

static void *help(void *argument)
{
    work(argument);
    let_go(argument);
    return NULL;
}

/* Starts at most that many helpers; fewer is no failure. */
static void start_helpers(struct job *job, size_t count)
{
    sigset_t all, before;
    pthread_attr_t attributes;
    pthread_t helper;

    if (pthread_attr_init(&attributes))
        return;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* the process's signals are for the threads that it made itself */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (count-- > 0) {
        atomic_fetch_add(&job->holders, 1);
        if (pthread_create(&helper, &attributes, help, job)) {
            atomic_fetch_sub(&job->holders, 1);
            break;
        }
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

static struct job *make_job(const struct spans *spans, uint64_t total_bytes)
{
    size_t pieces = (size_t)((total_bytes + PIECE_BYTES - 1) / PIECE_BYTES);
    struct job *job = malloc(sizeof *job + (pieces + 1) * sizeof *job->starts);
    if (job == NULL)
        return NULL;
    job->spans = *spans;
    job->pieces = pieces;
    atomic_init(&job->next, 0);
    atomic_init(&job->done, 0);
    atomic_init(&job->holders, 1);
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->all_done, NULL);
    size_t piece = 0;
    uint64_t before_bytes = 0; /* lengths of the spans before this one */
    for (size_t i = 0; i < spans->count; i++) {
        for (; piece * PIECE_BYTES < before_bytes + spans->lengths[i]; piece++)
            job->starts[piece] = (struct place){i, piece * PIECE_BYTES - before_bytes};
        before_bytes += spans->lengths[i];
    }
    job->starts[pieces] = (struct place){spans->count, 0};
    return job;
}

/* Copies `lengths[i]` bytes from address `sources[i]` to `targets[i]`, for every i < count, on up to `threads` threads
 * of which the caller is one. No target may overlap anything else. Every byte has arrived when this returns. */
void cairn_copy(const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, uint64_t count,
                uint64_t threads)
{
    struct spans spans = {targets, sources, lengths, (size_t)count};
    struct job *job = NULL;
    uint64_t total_bytes = 0;

    for (size_t i = 0; i < spans.count; i++)
        total_bytes += lengths[i];
    if (threads > 1 && total_bytes > PIECE_BYTES)
        job = make_job(&spans, total_bytes);
    if (job == NULL) {
        copy_range(&spans, (struct place){0, 0}, (struct place){spans.count, 0});
        return;
    }
    start_helpers(job, (size_t)(threads < job->pieces ? threads : job->pieces) - 1);
    work(job);
    pthread_mutex_lock(&job->lock);
    while (atomic_load(&job->done) < job->pieces)
        pthread_cond_wait(&job->all_done, &job->lock);
    pthread_mutex_unlock(&job->lock);
    let_go(job);
}
