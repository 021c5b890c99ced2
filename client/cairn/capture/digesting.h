/* Copying with the two checksums of a checkpoint taken on the way: CRC-64/NVME and the CRC-32 of zip. */
#ifndef CAIRN_DIGESTING_H
#define CAIRN_DIGESTING_H

#include <stddef.h>
#include <stdint.h>

struct checksums {
    uint64_t crc64nvme;
    uint32_t crc32;
};

/* Whether this processor takes both checksums in the time in which it copies. */
int can_digest(void);

/* Copies and returns the checksums of what was copied. Needs can_digest(). What it stored is visible to other threads
 * after a store fence. */
struct checksums copy_digesting(char *target, const char *source, size_t length);

#endif
