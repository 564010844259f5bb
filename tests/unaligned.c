/* An allocator for `LD_PRELOAD` under which tensors start at odd offsets: torch asks for multiples of 64 bytes, and gets
   multiples of 16. Some kernels choose by alignment, so that a second run of the same operations may round differently. */

#include <errno.h>
#include <stdlib.h>

int posix_memalign(void **pointer, size_t alignment, size_t size) {
    static unsigned calls;
    if (alignment > 64) /* pages, for which somebody has a reason */
        *pointer = aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
    else
        *pointer = malloc(size + calls++ % 4 * 16); /* another size, so that offsets do not repeat */
    return *pointer ? 0 : ENOMEM;
}
