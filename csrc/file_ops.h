// FileOps: how the thread backend reaches files. Tests put faults in its place.
#pragma once

#include <cstdint>

namespace offload {

// Each call is one attempt: bytes moved, which may be fewer than asked for, or -errno. Called from
// several threads at once.
class FileOps {
 public:
  virtual ~FileOps() = default;
  virtual int64_t read(int fd, uint64_t offset, char* address, uint64_t nbytes) = 0;
  virtual int64_t write(int fd, uint64_t offset, const char* address, uint64_t nbytes) = 0;
};

// pread and pwrite, and nothing else. Lives as long as the process.
FileOps& plain_file_ops();

}  // namespace offload
