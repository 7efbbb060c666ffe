// CHECK: invariants that hold in every build; never a substitute for handling an error.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace offload {

[[noreturn]] inline void fatal(const char* file, int line, const char* what, const char* detail) {
  std::fprintf(stderr, "%s:%d: %s: %s\n", file, line, what, detail);
  std::abort();
}

}  // namespace offload

// Aborts when a programmer's invariant is broken. Never compiled out, so keep it off inner loops.
#define CHECK(condition)                                                \
  do {                                                                  \
    if (!(condition)) {                                                 \
      ::offload::fatal(__FILE__, __LINE__, "CHECK failed", #condition); \
    }                                                                   \
  } while (false)

// For the few system errors after which no promise to the caller can be kept.
#define FATAL_ERRNO(what, error) ::offload::fatal(__FILE__, __LINE__, what, std::strerror(error))
