// UpdatePipeline: streams optimizer updates through memory, tile by tile, on a thread of its own.
//
// [Note: tiles in flight] A job is cut into tiles of tile_numel elements. Each tile reads what it
// needs in one transfer, runs the kernels, and writes in one transfer; num_tiles of them are in
// flight, so with three one is read while one is computed and one is written. A tile that no op
// touches moves nothing, except a weight that is read into memory: that is how a fetch with an
// update works.
//
// Jobs start in order. The tiles of the next job start while the last tiles of this one are still
// in flight, unless both touch the same bytes: then the next waits until this one is done. Jobs
// therefore can complete out of order.
//
// All of it waits behind what is urgent in the queue: reads that compute waits for, or will. Within
// the job reads and writes are equals, for a tile's write frees the memory that the next read
// needs.
//
// The first error of a job ends it: nothing new is started for it, what is in flight is awaited,
// and it completes once. Its planes are then part old and part new, so the caller must not use
// them.
//
// Where segments have checksums, a tile goes through the caches once: a stretch of it at a time is
// verified, computed, and given its new checksums. A block with another checksum ends the job with
// EBADMSG and that block's offset, and nothing of the tile is written. The new checksums go into
// the table just before the tile's write starts, so the table never runs ahead of the files by more
// than the writes in flight.
//
// Where the queue packs, runs (see [Note: packed runs]) are unpacked in place when a tile begins to
// be computed, and packed stretch by stretch: in place too, or from a slot into the tile's buffer.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "io_queue.h"
#include "kernels.h"
#include "update_job.h"

namespace offload {

constexpr unsigned kTilesMax = 64;
constexpr uint64_t kTileNumelMax = uint64_t{1} << 31;

struct UpdateCompletion {
  uint64_t tag;
  int64_t result;   // 0, or -errno of the first transfer that failed
  int fd;           // of the failure; -1 on success
  uint64_t offset;  // of the failure; 0 on success
  uint64_t read_bytes;
  uint64_t write_bytes;
  double seconds;  // from submit to completion
  double kernel_seconds;
  std::vector<std::pair<int, uint64_t>> written;  // of write_bytes, by fd
};

struct UpdateConfig {
  IoQueue* queue;  // shared with other callers; outlives the pipeline
  unsigned num_tiles;
  uint64_t tile_numel;
  char* buffer;  // update_buffer_nbytes of it, on a 4 KiB boundary, lent until close()
  const KernelSet* kernels;
  uint64_t checksum_nbytes = 0;  // as in IoQueue::create
};

uint64_t update_buffer_nbytes(unsigned num_tiles, uint64_t tile_numel);

class UpdatePipeline {
 public:
  // Null and *error set to an errno when the system has no thread to give.
  static std::unique_ptr<UpdatePipeline> create(const UpdateConfig& config, int* error);
  ~UpdatePipeline();
  UpdatePipeline(const UpdatePipeline&) = delete;
  UpdatePipeline& operator=(const UpdatePipeline&) = delete;

  // Queues a job that validate_job accepts; its memory and files must stay valid until it
  // completes. False, and nothing queued, when the pipeline is closed. Any thread may call the
  // functions here.
  bool submit(UpdateJob job);

  // Appends the completions that are there and returns how many.
  size_t poll(std::vector<UpdateCompletion>& completions);

  // Like poll, but sleeps until there is at least one, the timeout is over, or the pipeline is
  // closed.
  size_t wait(double timeout_s, std::vector<UpdateCompletion>& completions);

  bool is_closed() const;
  const UpdateConfig& config() const { return config_; }

  // Finishes what was submitted and joins the thread. Calling it again is a no-op.
  void close();

 private:
  using Clock = std::chrono::steady_clock;

  // A job from submit to completion.
  struct Running {
    UpdateJob job;
    Clock::time_point submitted;
    uint64_t next_element = 0;  // where the next tile begins
    unsigned num_tiles = 0;     // in flight
    UpdateCompletion completion = {};

    bool has_failed() const { return completion.result < 0; }
    bool has_tiles_left() const { return !has_failed() && next_element < job.numel; }
    bool is_done() const { return num_tiles == 0 && !has_tiles_left(); }
  };

  struct Tile {
    enum class Phase { kFree, kReading, kReady, kWriting };
    Phase phase = Phase::kFree;
    Running* running = nullptr;
    uint64_t begin = 0;  // elements
    uint64_t end = 0;
    uint64_t sequence = 0;                          // in the order of starting
    uint64_t nbytes = 0;                            // of the transfer in flight
    std::vector<std::pair<int, uint64_t>> written;  // by the write in flight: fd, bytes
    bool is_written = false;  // else it is free again once its weights have been read
    char* buffer = nullptr;
  };

  // A table's entry, and what it will be.
  struct Seal {
    uint32_t* entry;
    uint32_t value;
  };

  explicit UpdatePipeline(const UpdateConfig& config);

  void run();
  bool admit_jobs();
  bool overlaps_running(const UpdateJob& job) const;
  Running* next_to_start();
  void start_tiles();
  void start_tile(Tile& tile, Running& running);
  bool is_read(const Tile& tile, int plane) const;
  char* tile_memory(const Tile& tile, int plane, uint64_t element) const;
  char* stored_memory(const Tile& tile, int op, int plane) const;
  char* tile_buffer(const Tile& tile, int plane, uint64_t element) const;
  void cut(const Tile& tile, int op, int plane, uint64_t begin, uint64_t end, char* memory);
  void start_transfer(Tile& tile, int op);
  Tile* oldest_ready();
  void compute(Tile& tile);
  bool compute_stretch(const Tile& tile, uint64_t begin, uint64_t end);
  bool verify(const Tile& tile, uint64_t begin, uint64_t end);
  void seal(const Tile& tile, uint64_t begin, uint64_t end);
  bool unpack(const Tile& tile);
  void pack(const Tile& tile, int plane, const IoSegment& segment);
  bool has_tiles_in_flight() const;
  void reap(double timeout_s);
  void finish_transfer(const IoCompletion& completion);
  void fail(Running& running, const IoCompletion& completion);
  void free_tile(Tile& tile);
  void retire_jobs();

  const UpdateConfig config_;
  IoQueue& queue_;
  IoMailbox mailbox_;

  // The worker's own; nobody else touches them.
  std::deque<std::unique_ptr<Running>> running_;
  std::vector<Tile> tiles_;
  uint64_t next_sequence_ = 0;
  std::vector<IoSegment> segments_;           // scratch
  std::vector<Seal> seals_;                   // of the tile that is computed
  std::vector<uint32_t> lengths_;             // scratch
  char* packed_end_[kNumPlanes] = {};         // of the run that is packed
  std::vector<IoCompletion> io_completions_;  // scratch

  mutable std::mutex mutex_;
  std::condition_variable submitted_;
  std::condition_variable completed_;
  // Guarded by mutex_.
  std::deque<std::unique_ptr<Running>> inbox_;
  std::vector<UpdateCompletion> completions_;
  bool closing_ = false;
  bool joined_ = false;

  std::mutex close_mutex_;
  std::thread worker_;
};

}  // namespace offload
