"""Work that several threads share, in phases of one parallel region.

A thread goes on to the next phase when all of the present one is done, and takes
another's work when it has none left. One thread alone does everything: none needs
another to be running, so that nothing hangs on a busy machine.
"""
from std.atomic import Atomic
from std.memory.alloc import unsafe_alloc
from std.sys import CompilationTarget, llvm_intrinsic
from max.algorithm import sync_parallelize
from max.runtime.asyncrt import parallelism_level

# Counters lie a cache line apart.
comptime APART = 8


@always_inline
def pause():
    """Lets the core's other thread run, in a loop that waits."""
    comptime if CompilationTarget.is_x86():
        llvm_intrinsic["llvm.x86.sse2.pause", NoneType]()


@fieldwise_init
struct Team(Copyable, ImplicitlyCopyable, Movable):
    """The threads of a region, and how far each phase is."""

    var counters: Pointer[Scalar[DType.int64], MutUntrackedOrigin]
    var size: Int
    var phases: Int

    def share[
        Work: def(Int, Int) -> None
    ](self, me: Int, phase: Int, units: Int, grain: Int, work: Work):
        """Calls work(first, stop) for parts of 0 .. units.

        Returns when all units are done; of the last phase, when none is left to take.
        """
        var base = self.counters.unsafe_offset(phase * (self.size + 1) * APART)
        var done = base.unsafe_offset(self.size * APART)
        for turn in range(self.size):
            var whose = (me + turn) % self.size
            var first = whose * units // self.size
            var stop = (whose + 1) * units // self.size
            var counter = base.unsafe_offset(whose * APART)
            while Int(Atomic.load(counter)) + first < stop:
                var at = first + Int(Atomic.fetch_add(counter, Int64(grain)))
                if at >= stop:
                    break
                var end = min(at + grain, stop)
                work(at, end)
                _ = Atomic.fetch_add(done, Int64(end - at))
        if phase + 1 < self.phases:
            while Int(Atomic.load(done)) < units:
                pause()


def run_team[
    Body: def(Team, Int) -> None
](phases: Int, is_parallel: Bool, body: Body) raises:
    """Calls body(team, me) on every thread, or on this one only."""
    var size = parallelism_level(None) if is_parallel else 1
    var count = phases * (size + 1) * APART
    var counters = unsafe_alloc[Scalar[DType.int64]](count, alignment=64)
    for i in range(count):
        counters.unsafe_offset(i).unsafe_store(Int64(0))
    var team = Team(counters, size, phases)

    def task(me: Int) {imm}:
        body(team, me)

    if size == 1:
        task(0)
    else:
        sync_parallelize(task, size)
    counters.unsafe_free()
