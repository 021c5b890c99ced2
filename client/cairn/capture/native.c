/* Copies many spans of memory in one call: no Python, no torch, plain C11 and POSIX threads.
 *
 * Long spans are written with non-temporal stores where the processor has them. They do not first read the lines that
 * they overwrite, and took three quarters of the time of memcpy.
 *
 * Long spans are cut and short ones put together, and every thread takes the next batch when it is done with its last.
 * A helper that the scheduler does not run takes none, so nobody waits for it. Helpers live for one call. There is
 * nothing to look after at a fork, and starting one costs 20 microseconds.
 */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "digesting.h"

#define UNIT_BYTES ((uint64_t)4 << 20)  /* longer spans are cut: a thread is not alone with one for long */
#define BATCH_BYTES ((uint64_t)1 << 20) /* at least; a thread takes that much at a time */
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
    const uint64_t *targets, *sources, *lengths;
    uint64_t target_base, source_base; /* to be added to all targets, and to all sources */
    size_t count;
};

/* The checksums of `length` bytes that went to `offset`; read by callers as four numbers of 64 bits. */
struct digest {
    uint64_t offset, length, crc64nvme, crc32;
};

struct digests {
    struct digest *entries; /* NULL: none are wanted */
    uint64_t from_bytes;
    uint64_t count;
};

/* A part of one span: cut where the target, without its base, is a multiple of UNIT_BYTES. */
struct unit {
    char *target;
    const char *source;
    size_t length;
    struct digest *digest; /* NULL: not wanted */
};

struct job {
    atomic_size_t next;
    atomic_size_t done;
    size_t batches;
    atomic_int holders; /* the caller and its helpers; the last one frees the job */
    pthread_mutex_t lock;
    pthread_cond_t all_done;
    struct unit *units;
    size_t *starts; /* of each batch, its first unit; one more than there are batches */
};

static void copy_unit(const struct unit *unit)
{
    if (unit->digest == NULL) {
        copy_span(unit->target, unit->source, unit->length);
        return;
    }
    struct checksums checksums = copy_digesting(unit->target, unit->source, unit->length);
    unit->digest->crc64nvme = checksums.crc64nvme;
    unit->digest->crc32 = checksums.crc32;
}

static void work(struct job *job)
{
    size_t batch;
    while ((batch = atomic_fetch_add(&job->next, 1)) < job->batches) {
        for (size_t i = job->starts[batch]; i < job->starts[batch + 1]; i++)
            copy_unit(&job->units[i]);
        finish_stores();
        if (atomic_fetch_add(&job->done, 1) + 1 == job->batches) {
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
        free(job->units);
        free(job->starts);
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

static char *target_of(const struct spans *spans, uint64_t target)
{
    return (char *)(uintptr_t)(spans->target_base + target);
}

static const char *source_of(const struct spans *spans, uint64_t source)
{
    return (const char *)(uintptr_t)(spans->source_base + source);
}

static size_t units_of(uint64_t target, uint64_t length)
{
    return length ? (size_t)((target + length - 1) / UNIT_BYTES - target / UNIT_BYTES + 1) : 0;
}

/* Cuts the spans into units, and these into batches; fills all of a digest but its checksums. */
static void lay_out(struct job *job, const struct spans *spans, struct digests *digests)
{
    size_t unit = 0;
    uint64_t batch_bytes = BATCH_BYTES;

    for (size_t i = 0; i < spans->count; i++) {
        int digested = digests->entries != NULL && spans->lengths[i] >= digests->from_bytes;
        for (uint64_t at = 0; at < spans->lengths[i];) {
            uint64_t target = spans->targets[i] + at, left = spans->lengths[i] - at;
            uint64_t source = spans->sources[i] + at, room = UNIT_BYTES - target % UNIT_BYTES;
            uint64_t length = left < room ? left : room;
            struct digest *digest = digested ? &digests->entries[digests->count++] : NULL;
            if (digest != NULL)
                *digest = (struct digest){target, length, 0, 0};
            if (batch_bytes >= BATCH_BYTES) {
                job->starts[job->batches++] = unit;
                batch_bytes = 0;
            }
            job->units[unit++] = (struct unit){target_of(spans, target), source_of(spans, source), (size_t)length, digest};
            batch_bytes += length;
            at += length;
        }
    }
    job->starts[job->batches] = unit;
}

static struct job *make_job(const struct spans *spans, struct digests *digests)
{
    size_t units = 0;
    struct job *job = calloc(1, sizeof *job);
    if (job == NULL)
        return NULL;
    for (size_t i = 0; i < spans->count; i++)
        units += units_of(spans->targets[i], spans->lengths[i]);
    job->units = malloc((units + 1) * sizeof *job->units);
    job->starts = malloc((units + 1) * sizeof *job->starts);
    if (job->units == NULL || job->starts == NULL) {
        free(job->units);
        free(job->starts);
        free(job);
        return NULL;
    }
    atomic_init(&job->next, 0);
    atomic_init(&job->done, 0);
    atomic_init(&job->holders, 1);
    pthread_mutex_init(&job->lock, NULL);
    pthread_cond_init(&job->all_done, NULL);
    lay_out(job, spans, digests);
    return job;
}

/* Whether cairn_copy takes digests on this processor. */
int cairn_can_digest(void)
{
    return can_digest();
}

/* Copies `lengths[i]` bytes from `sources[i]` to `targets[i]`, for every i < count, on up to `threads` threads of which
 * the caller is one. To all targets and sources their base is added: addresses with a base of 0, or offsets. No target
 * may overlap anything else. Every byte has arrived when this returns.
 *
 * If `digests` is not NULL, spans of at least `from_bytes` are digested, in pieces that end where a target is a multiple
 * of 4 MiB. Returns how many digests that were; the caller has made room for them. Needs cairn_can_digest(). */
uint64_t cairn_copy(const uint64_t *targets, const uint64_t *sources, const uint64_t *lengths, uint64_t count,
                    uint64_t target_base, uint64_t source_base, uint64_t threads, struct digest *digests,
                    uint64_t from_bytes)
{
    struct spans spans = {targets, sources, lengths, target_base, source_base, (size_t)count};
    struct digests wanted = {digests, from_bytes, 0};
    struct job *job = make_job(&spans, &wanted);

    if (job == NULL) { /* no memory: without digests, and alone */
        for (size_t i = 0; i < spans.count; i++)
            copy_span(target_of(&spans, targets[i]), source_of(&spans, sources[i]), (size_t)lengths[i]);
        finish_stores();
        return 0;
    }
    if (job->batches > 1)
        start_helpers(job, (size_t)(threads < job->batches ? threads : job->batches) - 1);
    work(job);
    pthread_mutex_lock(&job->lock);
    while (atomic_load(&job->done) < job->batches)
        pthread_cond_wait(&job->all_done, &job->lock);
    pthread_mutex_unlock(&job->lock);
    let_go(job);
    return wanted.count;
}
