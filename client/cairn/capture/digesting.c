/* A copy is bound by memory, so a processor that can multiply polynomials 64 bytes at a time takes both checksums of
 * what it copies in passing: 7 % on top of the copy, where a pass of their own would take as long as the copy did.
 *
 * The method is that of "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction" (Gopal et al., Intel,
 * 2009): the message is a polynomial, four accumulators of 512 bits are multiplied by x^2048 modulo the generator and
 * the next 256 bytes added, and what is left at the end, 128 bits congruent to the whole message, goes through the
 * table. Both checksums are reflected: the lowest bit of the first byte is the highest coefficient.
 */
#include "digesting.h"

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10) /* older ones lack intrinsics */

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,pclmul,vpclmulqdq")))
#define STEP_BYTES ((size_t)256)
#define LINE_BYTES ((size_t)64)

struct generator {
    int degree;
    uint64_t coefficients; /* without the leading one; the highest bit is x^(degree-1) */
};

static const struct generator CRC64NVME = {64, 0xAD93D23594C93659u};
static const struct generator CRC32 = {32, 0x04C11DB7u};

/* What moves 128 bits by a distance: x^(distance+63) for the first eight bytes and x^(distance-1) for the others. */
struct shift {
    uint64_t first, second;
};

struct shifts {
    struct shift by_2048, by_512, by_128;
};

static struct shifts shifts64, shifts32;
static uint64_t table64[256];
static uint32_t table32[256];

static uint64_t reflected(uint64_t value)
{
    uint64_t result = 0;
    for (int i = 0; i < 64; i++)
        result |= (value >> i & 1) << (63 - i);
    return result;
}

/* x^exponent modulo the generator, reflected in 64 bits. */
static uint64_t power_of_x(int exponent, struct generator generator)
{
    uint64_t highest = (uint64_t)1 << (generator.degree - 1), value = 1;
    for (int i = 0; i < exponent; i++)
        value = (value & (highest - 1)) << 1 ^ (value & highest ? generator.coefficients : 0);
    return reflected(value);
}

static struct shift shift_by(int distance, struct generator generator)
{
    return (struct shift){power_of_x(distance + 63, generator), power_of_x(distance - 1, generator)};
}

static struct shifts shifts_of(struct generator generator)
{
    return (struct shifts){shift_by(2048, generator), shift_by(512, generator), shift_by(128, generator)};
}

__attribute__((constructor)) static void prepare(void)
{
    uint64_t poly64 = reflected(CRC64NVME.coefficients);
    uint32_t poly32 = (uint32_t)(reflected(CRC32.coefficients) >> 32);

    shifts64 = shifts_of(CRC64NVME);
    shifts32 = shifts_of(CRC32);
    for (int i = 0; i < 256; i++) {
        uint64_t crc64 = (uint64_t)i;
        uint32_t crc32 = (uint32_t)i;
        for (int bit = 0; bit < 8; bit++) {
            crc64 = crc64 >> 1 ^ (crc64 & 1 ? poly64 : 0);
            crc32 = crc32 >> 1 ^ (crc32 & 1 ? poly32 : 0);
        }
        table64[i] = crc64;
        table32[i] = crc32;
    }
}

static uint64_t continue64(uint64_t state, const char *bytes, size_t length)
{
    for (size_t i = 0; i < length; i++)
        state = state >> 8 ^ table64[(state ^ (uint8_t)bytes[i]) & 255];
    return state;
}

static uint32_t continue32(uint32_t state, const char *bytes, size_t length)
{
    for (size_t i = 0; i < length; i++)
        state = state >> 8 ^ table32[(state ^ (uint8_t)bytes[i]) & 255];
    return state;
}

TARGET static inline __m512i everywhere(struct shift shift)
{
    return _mm512_broadcast_i64x2(_mm_set_epi64x((long long)shift.second, (long long)shift.first));
}

/* *wide* moved by the distance of *shift*, plus *next*. */
TARGET static inline __m512i fold(__m512i wide, __m512i shift, __m512i next)
{
    __m512i first = _mm512_clmulepi64_epi128(wide, shift, 0x00), second = _mm512_clmulepi64_epi128(wide, shift, 0x11);
    return _mm512_ternarylogic_epi64(first, second, next, 0x96); /* the sum of the three */
}

/* Brings 256 bytes down to 16 that are congruent to them. */
TARGET static void finish_folding(const __m512i wide[4], const struct shifts *shifts, char result[16])
{
    __m512i by_512 = everywhere(shifts->by_512);
    __m512i sum = fold(fold(fold(wide[0], by_512, wide[1]), by_512, wide[2]), by_512, wide[3]);
    __m128i by_128 = _mm_set_epi64x((long long)shifts->by_128.second, (long long)shifts->by_128.first);
    __m128i lanes[4], narrow;

    _mm512_storeu_si512(lanes, sum);
    narrow = lanes[0];
    for (int i = 1; i < 4; i++)
        narrow = _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(narrow, by_128, 0x00),
                                             _mm_clmulepi64_si128(narrow, by_128, 0x11)),
                               lanes[i]);
    _mm_storeu_si128((__m128i *)result, narrow);
}

/* *length* is a positive multiple of STEP_BYTES, *target* is aligned to LINE_BYTES; *state64* and *state32* go on. */
TARGET static void copy_steps(char *target, const char *source, size_t length, uint64_t *state64, uint32_t *state32)
{
    __m512i shift64 = everywhere(shifts64.by_2048), shift32 = everywhere(shifts32.by_2048);
    __m512i wide64[4] = {0}, wide32[4] = {0}; /* nothing, moved by any distance */
    char rest[16];

    for (size_t at = 0; at < length; at += STEP_BYTES) {
        for (int i = 0; i < 4; i++) {
            __m512i line = _mm512_loadu_si512(source + at + LINE_BYTES * (size_t)i);
            _mm512_stream_si512((__m512i *)(target + at + LINE_BYTES * (size_t)i), line);
            wide64[i] = fold(wide64[i], shift64, line);
            wide32[i] = fold(wide32[i], shift32, line);
        }
        if (at == 0) {
            wide64[0] = _mm512_xor_si512(wide64[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128((long long)*state64)));
            wide32[0] = _mm512_xor_si512(wide32[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)*state32)));
        }
    }
    finish_folding(wide64, &shifts64, rest);
    *state64 = continue64(0, rest, sizeof rest);
    finish_folding(wide32, &shifts32, rest);
    *state32 = continue32(0, rest, sizeof rest);
}

int can_digest(void)
{
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("vpclmulqdq");
}

struct checksums copy_digesting(char *target, const char *source, size_t length)
{
    uint64_t state64 = ~(uint64_t)0;
    uint32_t state32 = ~(uint32_t)0;
    size_t head = (size_t)-(uintptr_t)target % LINE_BYTES;
    head = head < length ? head : length;
    size_t middle = (length - head) / STEP_BYTES * STEP_BYTES, tail = length - head - middle;

    /* The checksums are of what was stored, even if somebody changes the source meanwhile. */
    memcpy(target, source, head);
    state64 = continue64(state64, target, head);
    state32 = continue32(state32, target, head);
    if (middle)
        copy_steps(target + head, source + head, middle, &state64, &state32);
    target += head + middle;
    memcpy(target, source + head + middle, tail);
    state64 = continue64(state64, target, tail);
    state32 = continue32(state32, target, tail);
    return (struct checksums){~state64, ~state32};
}

#else

int can_digest(void)
{
    return 0;
}

struct checksums copy_digesting(char *target, const char *source, size_t length)
{
    (void)target, (void)source, (void)length;
    return (struct checksums){0, 0};
}

#endif
