// The update worker: jobs of several threads that overlap, fail and are closed upon give the bits
// that the kernels give in memory.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <thread>
#include <utility>

#include "../../csrc/crc32c.h"
#include "../../csrc/fault_ops.h"
#include "../../csrc/pack.h"
#include "../../csrc/update_pipeline.h"
#include "harness.h"
#include "planes.h"

namespace offload::tests {

namespace {

constexpr unsigned kNumTiles = 3;
constexpr uint64_t kChecksumNbytes = kPageNbytes;
constexpr uint64_t kSmallTileNumel = kTileAlignNumel;  // not for int8
constexpr uint64_t kLargeTileNumel = tile_align_numel(StateFormat::kInt8);
constexpr uint64_t kTilesPerChunkMax = 4;
constexpr uint64_t kPackStride = 1024;  // as many blocks as a plane can have

constexpr uint64_t chunk_nbytes(uint64_t tile_numel) {
  return kTilesPerChunkMax * tile_numel * kTileItemNbytes;
}

// One chunk: what its planes should hold, and where they are.
class Chunk {
 public:
  Chunk(const File& file, uint64_t begin, uint64_t seed, uint64_t tile_numel)
      : file_(file),
        dice_(seed),
        tile_numel_(tile_numel),
        format_(kFormats[seed % (tile_numel == kLargeTileNumel ? 4 : 3)]),
        numel_((1 + roll(dice_, tile_numel == kLargeTileNumel ? 2 : kTilesPerChunkMax)) *
               tile_numel) {
    for (int i = 0; i < kNumPlanes; ++i) {
      wanted_.push_back(make_plane(dice_, format_, i, numel_));
      homes_.emplace_back(wanted_[i].nbytes());
      in_memory_[i] = roll(dice_, 3) == 0;
      offsets_[i] = begin;
      begin += wanted_[i].nbytes();
      if (wanted_[i].nbytes() > 0) {
        std::memcpy(homes_[i].data(), wanted_[i].data(), wanted_[i].nbytes());
        file.write(offsets_[i], wanted_[i]);
      }
      const uint64_t num_blocks = num_checksums(wanted_[i].nbytes(), kChecksumNbytes);
      CHECK(num_blocks <= kPackStride);
      checksums_[i].resize(kPackStride + num_blocks);
      set_plain(checksums_[i].data() + kPackStride, wanted_[i].nbytes(), kChecksumNbytes);
      crc32c_blocks(wanted_[i].data(), wanted_[i].nbytes(), kChecksumNbytes, checksums_[i].data());
    }
  }

  // The next step as a job, which the expected planes have taken when this returns.
  UpdateJob next_job(uint64_t tag) {
    UpdateJob job;
    job.tag = tag;
    job.format = format_;
    job.numel = numel_;
    job.ops = make_ops(dice_, format_, numel_, ++num_steps_);
    char* planes[kNumPlanes] = {};
    for (int i = 0; i < kNumPlanes; ++i) {
      if (plane_layout(format_, i).item_nbytes > 0) {
        job.planes[i] = place(i);
        planes[i] = wanted_[i].data();
      }
    }
    CHECK(validate_job(job, tile_numel_, kChecksumNbytes).empty());
    run_kernels(job, *portable_kernels(), 0, numel_, planes);
    return job;
  }

  void check() const {
    for (int i = 0; i < kNumPlanes; ++i) {
      if (wanted_[i].nbytes() > 0) {
        CHECK(in_memory_[i] ? homes_[i] == wanted_[i] : stored(i) == wanted_[i]);
      }
    }
  }

  // Blocks that are packed now, by a pipeline that does.
  uint64_t num_packed() const {
    uint64_t count = 0;
    for (int i = 0; i < kNumPlanes; ++i) {
      for (size_t at = kPackStride; at < checksums_[i].size(); ++at) {
        count += checksums_[i][at] < kChecksumNbytes;
      }
    }
    return count;
  }

 private:
  UpdatePlane place(int i) {
    UpdatePlane plane;
    plane.present = true;
    if (in_memory_[i]) {
      plane.address = homes_[i].data();
      return plane;
    }
    // Two pieces, so that tiles cross from one to the other.
    const uint64_t nbytes = wanted_[i].nbytes();
    const uint64_t first = first_piece_nbytes(i);
    uint32_t* const checksums = checksums_[i].data();
    plane.read = {
        {file_.fd(), offsets_[i], first, checksums},
        {file_.fd(), offsets_[i] + first, nbytes - first, checksums + first / kChecksumNbytes}};
    plane.has_read = true;
    plane.has_write = i < kGrad;
    if (plane.has_write) {
      plane.write = plane.read;
    }
    return plane;
  }

  uint64_t first_piece_nbytes(int i) const {
    return wanted_[i].nbytes() / 2 / kChecksumNbytes * kChecksumNbytes;
  }

  // What a plane holds on the drive, run by run.
  Memory stored(int i) const {
    const uint64_t nbytes = wanted_[i].nbytes();
    const unsigned item_nbytes = packed_item_nbytes(format_, i);
    Memory plain = file_.read(offsets_[i], nbytes);
    const uint64_t tile_nbytes = plane_nbytes(format_, i, tile_numel_);
    for (uint64_t begin = 0; item_nbytes > 0 && begin < nbytes;) {
      const uint64_t piece_end = begin < first_piece_nbytes(i) ? first_piece_nbytes(i) : nbytes;
      const uint64_t end = std::min(piece_end, (begin / tile_nbytes + 1) * tile_nbytes);
      CHECK(unpack_run(item_nbytes, plain.data() + begin, end - begin, kChecksumNbytes,
                       checksums_[i].data() + kPackStride + begin / kChecksumNbytes));
      begin = end;
    }
    return plain;
  }

  const File& file_;
  Dice dice_;
  const uint64_t tile_numel_;
  const StateFormat format_;
  const uint64_t numel_;
  int64_t num_steps_ = 0;
  std::vector<Memory> wanted_;
  std::vector<Memory> homes_;
  std::vector<uint32_t> checksums_[kNumPlanes];
  bool in_memory_[kNumPlanes];
  uint64_t offsets_[kNumPlanes];
};

struct Worker {
  Worker(Backend backend, uint64_t tile_numel, bool packs = false)
      : buffer(update_buffer_nbytes(kNumTiles, tile_numel)) {
    int error = 0;
    queue = IoQueue::create(backend, 8, 4 * kPageNbytes, 4, &error, kChecksumNbytes,
                            packs ? kPackStride : 0);
    CHECK(queue != nullptr && error == 0);
    const UpdateConfig config = {queue.get(),          kNumTiles,      tile_numel, buffer.data(),
                                 find_kernels("auto"), kChecksumNbytes};
    pipeline = UpdatePipeline::create(config, &error);
    CHECK(pipeline != nullptr && error == 0);
  }

  Memory buffer;
  std::unique_ptr<IoQueue> queue;
  std::unique_ptr<UpdatePipeline> pipeline;
};

std::vector<std::unique_ptr<Chunk>> make_chunks(const File& file, uint64_t count, uint64_t seed,
                                                uint64_t tile_numel) {
  std::vector<std::unique_ptr<Chunk>> chunks;
  for (uint64_t i = 0; i < count; ++i) {
    chunks.push_back(
        std::make_unique<Chunk>(file, i * chunk_nbytes(tile_numel), seed + i, tile_numel));
  }
  return chunks;
}

// Two threads submit several steps of the same chunks without waiting, two collect.
void storm(Backend backend, uint64_t seed, uint64_t tile_numel = kSmallTileNumel,
           bool packs = false) {
  constexpr uint64_t kChunks = 4;
  constexpr uint64_t kSteps = 3;
  const File file(kChunks * chunk_nbytes(tile_numel));
  const auto chunks = make_chunks(file, kChunks, seed, tile_numel);
  Worker worker(backend, tile_numel, packs);
  std::atomic<uint64_t> num_done{0};
  std::vector<std::thread> threads;
  for (uint64_t half = 0; half < 2; ++half) {
    threads.emplace_back([&, half] {
      for (uint64_t step = 0; step < kSteps; ++step) {
        for (uint64_t i = half; i < kChunks; i += 2) {
          CHECK(worker.pipeline->submit(chunks[i]->next_job(i)));
        }
      }
    });
    threads.emplace_back([&, half] {
      std::vector<UpdateCompletion> rows;
      while (num_done.load() < kChunks * kSteps) {
        rows.clear();
        half == 0 ? worker.pipeline->wait(0.05, rows) : worker.pipeline->poll(rows);
        for (const UpdateCompletion& row : rows) {
          CHECK(row.result == 0 && row.fd == -1 && row.tag < kChunks);
          num_done.fetch_add(1);
        }
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  uint64_t num_packed = 0;
  for (const auto& chunk : chunks) {
    chunk->check();
    num_packed += chunk->num_packed();
  }
  CHECK((num_packed > 0) == packs);
  worker.pipeline->close();
  CHECK(!worker.pipeline->submit(chunks[0]->next_job(0)));
}

TEST(pipeline_storm) {
  for (const Backend backend : backends()) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      storm(backend, 10 * seed);
    }
    storm(backend, 0, kLargeTileNumel);
  }
}

TEST(pipeline_storm_packed) {
  for (const Backend backend : backends()) {
    for (uint64_t seed = 0; seed < 3; ++seed) {
      storm(backend, 10 * seed, kSmallTileNumel, true);
    }
    storm(backend, 0, kLargeTileNumel, true);
  }
}

// Steps of the same chunk one right behind the other: each reads what the last one has written.
TEST(pipeline_steps_of_one_chunk) {
  constexpr uint64_t kSteps = 6;
  for (const Backend backend : backends()) {
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const File file(chunk_nbytes(kSmallTileNumel));
      const auto chunks = make_chunks(file, 1, seed, kSmallTileNumel);
      Worker worker(backend, kSmallTileNumel);
      std::vector<UpdateJob> jobs;
      for (uint64_t step = 0; step < kSteps; ++step) {
        jobs.push_back(chunks[0]->next_job(step));
      }
      for (UpdateJob& job : jobs) {
        CHECK(worker.pipeline->submit(std::move(job)));
      }
      std::vector<UpdateCompletion> rows;
      while (rows.size() < kSteps) {
        worker.pipeline->wait(60.0, rows);
      }
      for (uint64_t step = 0; step < kSteps; ++step) {
        CHECK(rows[step].tag == step && rows[step].result == 0);
      }
      chunks[0]->check();
    }
  }
}

TEST(pipeline_storm_with_faults) {
  set_fault_plan({{{FaultKind::kShort, 0, 0.1},
                   {FaultKind::kEintr, 0, 0.1},
                   {FaultKind::kEagain, 0, 0.05},
                   {FaultKind::kReorder, 0, 0.1}},
                  1,
                  1e-3});
  storm(Backend::kFaults, 100);
  storm(Backend::kFaults, 101, kSmallTileNumel, true);
  clear_fault_plan();
}

// One failure ends one job, once; the others come out right, and so does what follows.
TEST(pipeline_survives_errors) {
  constexpr uint64_t kChunks = 3;
  const File file((kChunks + 1) * chunk_nbytes(kSmallTileNumel));
  for (uint64_t number = 1; number < 60; number += 4) {
    const auto chunks = make_chunks(file, kChunks + 1, number, kSmallTileNumel);
    Worker worker(Backend::kFaults, kSmallTileNumel);
    set_fault_plan({{{FaultKind::kEio, number, 0.0}}, 0, 0.0});
    for (uint64_t i = 0; i < kChunks; ++i) {
      CHECK(worker.pipeline->submit(chunks[i]->next_job(i)));
    }
    std::vector<UpdateCompletion> rows;
    while (rows.size() < kChunks) {
      worker.pipeline->wait(60.0, rows);
    }
    const uint64_t num_failed = fault_counts().num_injected[static_cast<int>(FaultKind::kEio)];
    clear_fault_plan();
    CHECK(rows.size() == kChunks && num_failed <= 1);
    for (const UpdateCompletion& row : rows) {
      if (row.result == 0) {
        chunks[row.tag]->check();
      } else {
        CHECK(row.result == -EIO && row.fd == file.fd());
      }
    }
    CHECK(num_failed ==
          static_cast<uint64_t>(std::count_if(rows.begin(), rows.end(),
                                              [](const auto& row) { return row.result != 0; })));
    CHECK(worker.pipeline->submit(chunks[kChunks]->next_job(kChunks)));
    rows.clear();
    while (rows.empty()) {
      worker.pipeline->wait(60.0, rows);
    }
    CHECK(rows[0].tag == kChunks && rows[0].result == 0);
    chunks[kChunks]->check();
  }
}

// Whatever the drive does to one write or one read, the job that reads it fails, and says where.
TEST(pipeline_finds_lies) {
  for (const FaultKind kind :
       {FaultKind::kFlipRead, FaultKind::kFlipWrite, FaultKind::kDrop, FaultKind::kMisplace}) {
    int num_found = 0;
    for (uint64_t number = 1; number < 12; number += 3) {
      const File file(chunk_nbytes(kSmallTileNumel));
      const auto chunks = make_chunks(file, 1, number, kSmallTileNumel);
      Worker worker(Backend::kFaults, kSmallTileNumel, number % 2 == 0);
      set_fault_plan({{{kind, number, 0.0}}, number, 0.0});
      std::vector<UpdateCompletion> rows;
      for (uint64_t step = 0; step < 2; ++step) {
        CHECK(worker.pipeline->submit(chunks[0]->next_job(step)));
      }
      while (rows.size() < 2) {
        worker.pipeline->wait(60.0, rows);
      }
      clear_fault_plan();
      const uint64_t num_injected = fault_counts().num_injected[static_cast<int>(kind)];
      bool has_failed = false;
      for (const UpdateCompletion& row : rows) {
        CHECK(row.result == 0 || (row.result == -EBADMSG && row.fd == file.fd()));
        has_failed |= row.result != 0;
      }
      CHECK(has_failed || kind != FaultKind::kFlipRead || num_injected == 0);
      num_found += has_failed;
      worker.pipeline->close();
    }
    CHECK(num_found > 0);  // the other lies show where the second step reads them
  }
}

// close() finishes what was taken, and only that, whoever is submitting or waiting.
void close_under_fire(Backend backend, uint64_t seed) {
  const File file(2 * chunk_nbytes(kSmallTileNumel));
  auto chunks = make_chunks(file, 2, seed, kSmallTileNumel);
  Worker worker(backend, kSmallTileNumel);
  std::atomic<int> num_submitted{0};
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 2; ++i) {
    threads.emplace_back([&, i] {
      for (int count = 0; count < 20 && worker.pipeline->submit(chunks[i]->next_job(i)); ++count) {
        num_submitted.fetch_add(1);
      }
    });
  }
  threads.emplace_back([&] {
    std::vector<UpdateCompletion> rows;
    while (!worker.pipeline->is_closed()) {
      worker.pipeline->wait(60.0, rows);
    }
  });
  while (num_submitted.load() < static_cast<int>(seed % 5)) {
    std::this_thread::yield();
  }
  std::thread other([&] { worker.pipeline->close(); });
  worker.pipeline->close();
  worker.buffer = Memory(kPageNbytes);  // nobody may use the tiles any more
  other.join();
  for (std::thread& thread : threads) {
    thread.join();
  }
}

TEST(pipeline_close_under_fire) {
  for (const Backend backend : backends()) {
    for (uint64_t seed = 0; seed < 6; ++seed) {
      close_under_fire(backend, seed);
    }
  }
}

TEST(pipeline_dies_with_work_in_flight) {
  for (const Backend backend : backends()) {
    const File file(2 * chunk_nbytes(kSmallTileNumel));
    auto chunks = make_chunks(file, 2, 3, kSmallTileNumel);
    {
      Worker worker(backend, kSmallTileNumel);
      for (int step = 0; step < 3; ++step) {
        for (uint64_t i = 0; i < 2; ++i) {
          CHECK(worker.pipeline->submit(chunks[i]->next_job(i)));
        }
      }
      worker.pipeline.reset();
    }
    for (const auto& chunk : chunks) {
      chunk->check();  // dying finishes, too
    }
  }
}

}  // namespace

}  // namespace offload::tests
