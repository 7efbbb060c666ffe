#include "update_pipeline.h"

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "check.h"
#include "crc32c.h"
#include "pack.h"

namespace offload {
namespace {

constexpr double kWaitSecondsMax = 86400.0 * 365;

void add_written(std::vector<std::pair<int, uint64_t>>& totals, int fd, uint64_t nbytes) {
  const auto found = std::find_if(totals.begin(), totals.end(),
                                  [fd](const auto& total) { return total.first == fd; });
  if (found == totals.end()) {
    totals.emplace_back(fd, nbytes);
  } else {
    found->second += nbytes;
  }
}

}  // namespace

uint64_t update_buffer_nbytes(unsigned num_tiles, uint64_t tile_numel) {
  return num_tiles * tile_numel * kTileItemNbytes;
}

std::unique_ptr<UpdatePipeline> UpdatePipeline::create(const UpdateConfig& config, int* error) {
  CHECK(config.num_tiles >= 1 && config.num_tiles <= kTilesMax);
  CHECK(config.tile_numel >= kTileAlignNumel && config.tile_numel <= kTileNumelMax);
  CHECK(config.tile_numel % kTileAlignNumel == 0);
  CHECK(config.checksum_nbytes % kPageNbytes == 0);
  std::unique_ptr<UpdatePipeline> pipeline(new UpdatePipeline(config));
  try {
    pipeline->worker_ = start_thread("offload-update", [p = pipeline.get()] { p->run(); });
  } catch (const std::system_error& failure) {
    *error = failure.code().value();
    return nullptr;
  }
  return pipeline;
}

UpdatePipeline::UpdatePipeline(const UpdateConfig& config)
    : config_(config), queue_(*config.queue), tiles_(config.num_tiles) {
  for (unsigned i = 0; i < config.num_tiles; ++i) {
    tiles_[i].buffer = config.buffer + update_buffer_nbytes(i, config.tile_numel);
  }
}

UpdatePipeline::~UpdatePipeline() { close(); }

bool UpdatePipeline::submit(UpdateJob job) {
  auto running = std::make_unique<Running>();
  running->submitted = Clock::now();
  running->completion.tag = job.tag;
  running->completion.fd = -1;
  running->job = std::move(job);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) {
      return false;
    }
    inbox_.push_back(std::move(running));
  }
  submitted_.notify_one();
  queue_.wake_waiter(
      &mailbox_);  // the worker may sleep there although it has tiles free for this job
  return true;
}

size_t UpdatePipeline::poll(std::vector<UpdateCompletion>& completions) {
  return wait(0.0, completions);
}

size_t UpdatePipeline::wait(double timeout_s, std::vector<UpdateCompletion>& completions) {
  const double sleep_s = timeout_s > 0 ? std::min(timeout_s, kWaitSecondsMax) : 0.0;
  std::unique_lock<std::mutex> lock(mutex_);
  if (sleep_s > 0) {  // a timed wait of no time still costs a timer
    completed_.wait_for(lock, std::chrono::duration<double>(sleep_s),
                        [this] { return !completions_.empty() || joined_; });
  }
  const size_t num_completions = completions_.size();
  completions.insert(completions.end(), completions_.begin(), completions_.end());
  completions_.clear();
  return num_completions;
}

bool UpdatePipeline::is_closed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return closing_;
}

void UpdatePipeline::close() {
  std::lock_guard<std::mutex> only_one(close_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  submitted_.notify_one();
  if (worker_.joinable()) {
    worker_.join();
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    joined_ = true;
  }
  completed_.notify_all();
}

void UpdatePipeline::run() {
  while (admit_jobs()) {
    reap(0.0);  // what is free now can read while the kernels run
    start_tiles();
    if (Tile* tile = oldest_ready()) {
      compute(*tile);
    } else if (has_tiles_in_flight()) {
      reap(kWaitSecondsMax);
    }
    retire_jobs();
  }
}

// Takes jobs from the inbox, sleeping only while there is nothing else to do. False at the very
// end.
bool UpdatePipeline::admit_jobs() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (running_.empty()) {
    submitted_.wait(lock, [this] { return closing_ || !inbox_.empty(); });
  }
  // A running job owns at least one tile or waits for one, so more than num_tiles would only wait.
  while (!inbox_.empty() && running_.size() <= config_.num_tiles &&
         !overlaps_running(inbox_.front()->job)) {
    running_.push_back(std::move(inbox_.front()));
    inbox_.pop_front();
  }
  return !running_.empty();
}

bool UpdatePipeline::overlaps_running(const UpdateJob& job) const {
  return std::any_of(running_.begin(), running_.end(),
                     [&job](const auto& running) { return jobs_overlap(running->job, job); });
}

UpdatePipeline::Running* UpdatePipeline::next_to_start() {
  const auto found = std::find_if(running_.begin(), running_.end(),
                                  [](const auto& running) { return running->has_tiles_left(); });
  return found == running_.end() ? nullptr : found->get();
}

void UpdatePipeline::start_tiles() {
  for (Tile& tile : tiles_) {
    // A tile without work is free again at once, hence the loop.
    while (tile.phase == Tile::Phase::kFree) {
      Running* running = next_to_start();
      if (!running) {
        return;
      }
      start_tile(tile, *running);
    }
  }
}

void UpdatePipeline::start_tile(Tile& tile, Running& running) {
  const UpdateJob& job = running.job;
  tile.running = &running;
  tile.begin = running.next_element;
  tile.end = std::min(tile.begin + config_.tile_numel, job.numel);
  tile.sequence = next_sequence_++;
  const size_t op = first_op_after(job, tile.begin);
  tile.is_written = job.write_all || (op < job.ops.size() && job.ops[op].begin < tile.end);
  running.next_element = tile.end;
  ++running.num_tiles;
  tile.phase = Tile::Phase::kReading;
  start_transfer(tile, kOpRead);
}

bool UpdatePipeline::is_read(const Tile& tile, int plane) const {
  const UpdatePlane& source = tile.running->job.planes[plane];
  return source.has_read && (tile.is_written || (plane == kWeight && source.address));
}

// Where an element of a tile is; null for a plane that the job lacks.
char* UpdatePipeline::tile_memory(const Tile& tile, int plane, uint64_t element) const {
  const UpdateJob& job = tile.running->job;
  if (!job.planes[plane].present) {
    return nullptr;
  }
  if (job.planes[plane].address) {
    return job.planes[plane].address + plane_nbytes(job.format, plane, element);
  }
  return tile_buffer(tile, plane, element);
}

// Its place in the tile's buffer, whether it passes through there or not.
char* UpdatePipeline::tile_buffer(const Tile& tile, int plane, uint64_t element) const {
  const UpdateJob& job = tile.running->job;
  uint64_t offset = plane_nbytes(job.format, plane, element - tile.begin);
  for (int i = 0; i < plane; ++i) {
    offset += plane_nbytes(job.format, i, config_.tile_numel);
  }
  return tile.buffer + offset;
}

// Where a tile's part of a plane is read to, or written from: packed weights of a slot leave from
// the tile's buffer.
char* UpdatePipeline::stored_memory(const Tile& tile, int op, int plane) const {
  const UpdateJob& job = tile.running->job;
  const bool is_packed = queue_.pack_stride() > 0 && packed_item_nbytes(job.format, plane) > 0 &&
                         has_checksums(job.planes[plane].write);
  return op == kOpWrite && is_packed ? tile_buffer(tile, plane, tile.begin)
                                     : tile_memory(tile, plane, tile.begin);
}

// Appends to segments_ what of a plane's elements [begin, end) is in which pieces, with their
// checksums and, for runs, the size of their items.
void UpdatePipeline::cut(const Tile& tile, int op, int plane, uint64_t begin, uint64_t end,
                         char* memory) {
  const UpdateJob& job = tile.running->job;
  const UpdatePlane& source = job.planes[plane];
  const size_t first = segments_.size();
  cut_segments(op == kOpRead ? source.read : source.write, plane_nbytes(job.format, plane, begin),
               plane_nbytes(job.format, plane, end), memory, config_.checksum_nbytes, segments_);
  for (size_t i = first; i < segments_.size(); ++i) {
    if (segments_[i].checksums && queue_.pack_stride() > 0) {
      segments_[i].item_nbytes = packed_item_nbytes(job.format, plane);
    }
  }
}

// Starts the read or the write of a tile, as its phase says; with nothing to move it is over at
// once. The queue moves the bytes as they are stored: checksums and packing are done here.
void UpdatePipeline::start_transfer(Tile& tile, int op) {
  const UpdateJob& job = tile.running->job;
  segments_.clear();
  for (int i = 0; i < kNumPlanes; ++i) {
    if (op == kOpRead ? is_read(tile, i) : job.planes[i].has_write) {
      cut(tile, op, i, tile.begin, tile.end, stored_memory(tile, op, i));
    }
  }
  tile.nbytes = 0;
  tile.written.clear();
  for (IoSegment& segment : segments_) {
    if (segment.item_nbytes > 0) {
      segment.nbytes = stored_nbytes(segment.checksums + queue_.pack_stride(), segment.nbytes,
                                     config_.checksum_nbytes);
      segment.item_nbytes = 0;
    }
    segment.checksums = nullptr;
    tile.nbytes += segment.nbytes;
    if (op == kOpWrite) {
      tile.written.emplace_back(segment.fd, segment.nbytes);
    }
  }
  const uint64_t tag = static_cast<uint64_t>(&tile - tiles_.data());
  if (tile.nbytes == 0) {
    finish_transfer({tag, 0, -1, 0, 0.0});
    return;
  }
  if (!queue_.submit(op, tag, kPriorityWriteBack, segments_.data(), segments_.size(), &mailbox_)) {
    finish_transfer({tag, -ECANCELED, segments_[0].fd, segments_[0].offset, 0.0});
  }
}

UpdatePipeline::Tile* UpdatePipeline::oldest_ready() {
  Tile* oldest = nullptr;
  for (Tile& tile : tiles_) {
    if (tile.phase == Tile::Phase::kReady && (!oldest || tile.sequence < oldest->sequence)) {
      oldest = &tile;
    }
  }
  return oldest;
}

void UpdatePipeline::compute(Tile& tile) {
  Running& running = *tile.running;
  const uint64_t stretch = hot_numel(running.job, config_.checksum_nbytes);
  const Clock::time_point begin = Clock::now();
  seals_.clear();
  if (!unpack(tile)) {
    return;
  }
  for (uint64_t at = tile.begin; at < tile.end; at += stretch) {
    if (!compute_stretch(tile, at, std::min(at + stretch, tile.end))) {
      return;  // the job has failed and the tile is free
    }
  }
  for (const Seal& seal : seals_) {
    *seal.entry = seal.value;
  }
  const std::chrono::duration<double> elapsed = Clock::now() - begin;
  running.completion.kernel_seconds += elapsed.count();
  if (!tile.is_written) {
    free_tile(tile);  // it was read for the weight alone
    return;
  }
  tile.phase = Tile::Phase::kWriting;
  start_transfer(tile, kOpWrite);
}

// Works on the elements [begin, end) while their bytes are in the caches; false if some are wrong.
bool UpdatePipeline::compute_stretch(const Tile& tile, uint64_t begin, uint64_t end) {
  if (!verify(tile, begin, end)) {
    return false;
  }
  if (tile.is_written) {
    char* planes[kNumPlanes];
    for (int i = 0; i < kNumPlanes; ++i) {
      planes[i] = tile_memory(tile, i, begin);
    }
    run_kernels(tile.running->job, *config_.kernels, begin, end, planes);
    seal(tile, begin, end);
  }
  return true;
}

bool UpdatePipeline::verify(const Tile& tile, uint64_t begin, uint64_t end) {
  segments_.clear();
  for (int i = 0; i < kNumPlanes; ++i) {
    if (is_read(tile, i)) {
      cut(tile, kOpRead, i, begin, end, tile_memory(tile, i, begin));
    }
  }
  for (const IoSegment& segment : segments_) {
    if (segment.checksums) {
      const uint64_t wrong = first_wrong_block(segment.address, segment.nbytes,
                                               config_.checksum_nbytes, segment.checksums);
      if (wrong < segment.nbytes) {
        fail(*tile.running, {0, -EBADMSG, segment.fd, segment.offset + wrong, 0.0});
        return false;
      }
    }
  }
  return true;
}

// Computes the checksums of what will be written, and packs it.
void UpdatePipeline::seal(const Tile& tile, uint64_t begin, uint64_t end) {
  for (int i = 0; i < kNumPlanes; ++i) {
    if (!tile.running->job.planes[i].has_write) {
      continue;
    }
    segments_.clear();
    cut(tile, kOpWrite, i, begin, end, tile_memory(tile, i, begin));
    for (const IoSegment& segment : segments_) {
      if (segment.checksums) {
        const char* bytes = static_cast<const char*>(segment.address);
        uint32_t* entry = segment.checksums;
        for (uint64_t at = 0; at < segment.nbytes; at += config_.checksum_nbytes) {
          const uint64_t nbytes = std::min(config_.checksum_nbytes, segment.nbytes - at);
          seals_.push_back({entry++, crc32c(bytes + at, nbytes)});
        }
      }
      if (segment.item_nbytes > 0) {
        pack(tile, i, segment);
      }
    }
  }
}

// Packs a stretch of a run behind those before it: in front of where it lies, or in the tile's
// buffer.
void UpdatePipeline::pack(const Tile& tile, int plane, const IoSegment& segment) {
  const char* const memory = static_cast<const char*>(segment.address);
  const uint64_t in_tile = memory - tile_memory(tile, plane, tile.begin);
  const std::vector<PlaneSegment>& pieces = tile.running->job.planes[plane].write;
  const bool begins_piece =
      std::any_of(pieces.begin(), pieces.end(), [&segment](const PlaneSegment& piece) {
        return piece.fd == segment.fd && piece.offset == segment.offset;
      });
  if (in_tile == 0 || begins_piece) {
    packed_end_[plane] = stored_memory(tile, kOpWrite, plane) + in_tile;
  }
  lengths_.resize(num_checksums(segment.nbytes, config_.checksum_nbytes));
  pack_run(segment.item_nbytes, memory, segment.nbytes, config_.checksum_nbytes, packed_end_[plane],
           lengths_.data());
  uint32_t* entry = segment.checksums + queue_.pack_stride();
  for (const uint32_t length : lengths_) {
    seals_.push_back({entry++, length});
    packed_end_[plane] += length;
  }
}

// Unpacks the runs that a tile has read; false if some are not what was packed.
bool UpdatePipeline::unpack(const Tile& tile) {
  if (queue_.pack_stride() == 0) {
    return true;
  }
  segments_.clear();
  for (int i = 0; i < kNumPlanes; ++i) {
    if (is_read(tile, i)) {
      cut(tile, kOpRead, i, tile.begin, tile.end, tile_memory(tile, i, tile.begin));
    }
  }
  for (const IoSegment& segment : segments_) {
    if (segment.item_nbytes > 0 &&
        !unpack_run(segment.item_nbytes, static_cast<char*>(segment.address), segment.nbytes,
                    config_.checksum_nbytes, segment.checksums + queue_.pack_stride())) {
      fail(*tile.running, {0, -EBADMSG, segment.fd, segment.offset, 0.0});
      return false;
    }
  }
  return true;
}

bool UpdatePipeline::has_tiles_in_flight() const {
  return std::any_of(running_.begin(), running_.end(),
                     [](const auto& running) { return running->num_tiles > 0; });
}

// Takes completions, sleeping up to timeout_s for the first; submit() can end the sleep, too.
void UpdatePipeline::reap(double timeout_s) {
  io_completions_.clear();
  queue_.wait(timeout_s, io_completions_, &mailbox_);
  for (const IoCompletion& completion : io_completions_) {
    CHECK(completion.tag < tiles_.size());
    finish_transfer(completion);
  }
}

void UpdatePipeline::finish_transfer(const IoCompletion& completion) {
  Tile& tile = tiles_[completion.tag];
  Running& running = *tile.running;
  const bool was_read = tile.phase == Tile::Phase::kReading;
  CHECK(was_read || tile.phase == Tile::Phase::kWriting);
  if (completion.result < 0) {
    fail(running, completion);
  } else {
    CHECK(static_cast<uint64_t>(completion.result) == tile.nbytes);
    (was_read ? running.completion.read_bytes : running.completion.write_bytes) += tile.nbytes;
    for (const auto& [fd, nbytes] : tile.written) {
      add_written(running.completion.written, fd, nbytes);
    }
  }
  const bool has_work = tile.is_written || (config_.checksum_nbytes > 0 && tile.nbytes > 0);
  if (was_read && has_work && !running.has_failed()) {
    tile.phase = Tile::Phase::kReady;
  } else {
    free_tile(tile);
  }
}

// Keeps the first error. Tiles that wait for their kernels, or are in them, are dropped: nothing of
// theirs is in flight.
void UpdatePipeline::fail(Running& running, const IoCompletion& completion) {
  if (running.has_failed()) {
    return;
  }
  running.completion.result = completion.result;
  running.completion.fd = completion.fd;
  running.completion.offset = completion.offset;
  for (Tile& tile : tiles_) {
    if (tile.running == &running && tile.phase == Tile::Phase::kReady) {
      free_tile(tile);
    }
  }
}

void UpdatePipeline::free_tile(Tile& tile) {
  CHECK(tile.running->num_tiles > 0);
  --tile.running->num_tiles;
  tile.running = nullptr;
  tile.phase = Tile::Phase::kFree;
}

void UpdatePipeline::retire_jobs() {
  bool has_retired = false;
  for (auto it = running_.begin(); it != running_.end();) {
    Running& running = **it;
    if (!running.is_done()) {
      ++it;
      continue;
    }
    const std::chrono::duration<double> elapsed = Clock::now() - running.submitted;
    running.completion.seconds = elapsed.count();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      completions_.push_back(running.completion);
    }
    it = running_.erase(it);
    has_retired = true;
  }
  if (has_retired) {
    completed_.notify_all();
  }
}

}  // namespace offload
