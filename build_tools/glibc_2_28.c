// What a static libstdc++ of GCC 11 or newer needs from a C library newer than 2.28.
#include <stdint.h>
#include <sys/random.h>

// 2.32: whether locks may be skipped.
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;

// 2.36: the source of std::random_device.
__attribute__((visibility("hidden"))) uint32_t arc4random(void) {
  uint32_t number = 0;
  getentropy(&number, sizeof number);
  return number;
}
