//! How long the rest takes, from how long the work so far has taken.
//!
//! Work is of several kinds, each with a cost per unit that is measured while it is done. A kind
//! that has not begun is taken to cost as much as usual, times what the others of its family have
//! turned out to cost compared with theirs.

use std::time::{Duration, Instant};

/// The newest samples of a kind's cost, which count: a machine's speed may change.
const SAMPLES: usize = 16;

/// Tells the time.
pub trait Clock {
    /// Since some moment that stays the same.
    fn now(&self) -> Duration;
}

/// The system's clock.
pub struct SystemClock(Instant);

impl SystemClock {
    /// From now on.
    pub fn start() -> Self {
        Self(Instant::now())
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// An estimate of the time that is left; kinds of work are numbered from 0.
pub struct Estimate<C> {
    clock: C,
    kinds: Vec<Kind>,
    /// When the last work was done.
    last: Duration,
}

/// A kind of work before it begins.
#[derive(Debug, Clone, Copy, Default)]
pub struct Planned {
    /// How much there is in all.
    pub units: f64,
    /// Seconds per unit, as far as is known before; only how that compares with other kinds counts.
    pub usual_cost: f64,
    /// Kinds that a machine is fast or slow at together.
    pub family: usize,
}

#[derive(Default, Clone)]
struct Kind {
    planned: Planned,
    done: f64,
    /// Since the last sample.
    current: Sample,
    /// The newest last.
    samples: Vec<Sample>,
}

/// Work and the time that it took.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    units: f64,
    seconds: f64,
}

impl Sample {
    fn cost(self) -> f64 {
        self.seconds / self.units
    }
}

impl<C: Clock> Estimate<C> {
    /// Nothing is planned yet.
    pub fn new(clock: C) -> Self {
        let last = clock.now();
        Self { clock, kinds: Vec::new(), last }
    }

    /// Plans a kind.
    pub fn plan(&mut self, kind: usize, planned: Planned) {
        if kind >= self.kinds.len() {
            self.kinds.resize(kind + 1, Kind::default());
        }
        self.kinds[kind] = Kind { planned, ..Kind::default() };
        self.last = self.clock.now();
    }

    /// A step begins now: the time since the last work counts for none.
    pub fn begin(&mut self) {
        self.step();
        self.last = self.clock.now();
    }

    /// `units` of a kind are done: the time since the last work was theirs.
    pub fn worked(&mut self, kind: usize, units: f64) {
        let now = self.clock.now();
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        if let Some(kind) = self.kinds.get_mut(kind) {
            kind.done += units;
            kind.current.units += units;
            kind.current.seconds += seconds;
        }
    }

    /// A step is done: what has been worked since the last one is a sample of what the kinds cost.
    pub fn step(&mut self) {
        for kind in self.kinds.iter_mut().filter(|kind| kind.current.units > 0.0) {
            if kind.samples.len() == SAMPLES {
                kind.samples.remove(0);
            }
            kind.samples.push(std::mem::take(&mut kind.current));
        }
    }

    /// The time that is left; `None` before anything has been measured.
    pub fn left(&self) -> Option<Duration> {
        let of_all = self.slowness(|_, _| true)?;
        let left = self.kinds.iter().enumerate().map(|(number, kind)| {
            let Planned { units, usual_cost, family } = kind.planned;
            let is_relative = |other, of: &Kind| other != number && of.planned.family == family;
            let by_others = self.slowness(is_relative).map(|slowness| slowness * usual_cost);
            let cost = match (kind.cost(), by_others) {
                // A single sample may be of a cold start.
                (Some(own), Some(others)) if kind.samples.len() == 1 => (own * others).sqrt(),
                (own, others) => own.or(others).unwrap_or(of_all * usual_cost),
            };
            (units - kind.done).max(0.0) * cost
        });
        let since = self.clock.now().saturating_sub(self.last);
        Some(Duration::from_secs_f64(left.sum()).saturating_sub(since))
    }

    /// What some kinds that have been measured cost compared with what they usually do.
    fn slowness(&self, is_chosen: impl Fn(usize, &Kind) -> bool) -> Option<f64> {
        let (mut found, mut usual) = (0.0, 0.0);
        for (_, kind) in
            self.kinds.iter().enumerate().filter(|(number, kind)| is_chosen(*number, kind))
        {
            if let Some(cost) = kind.cost() {
                found += kind.planned.units * cost;
                usual += kind.planned.units * kind.planned.usual_cost;
            }
        }
        (usual > 0.0).then(|| found / usual)
    }
}

impl Kind {
    /// The mean over its units, but for the fifth that was cheapest and the half that was dearest:
    /// what comes first waits for the disk. What a trial has measured counts for little as soon as
    /// there is more.
    fn cost(&self) -> Option<f64> {
        let mut samples = self.samples.clone();
        samples.sort_by(|a, b| a.cost().total_cmp(&b.cost()));
        let units: f64 = samples.iter().map(|sample| sample.units).sum();
        let (mut seconds, mut below) = (0.0, 0.0);
        for sample in &samples {
            let above = below + sample.units;
            let counted = above.min(0.5 * units) - f64::max(below, 0.2 * units);
            seconds += counted.max(0.0) * sample.cost();
            below = above;
        }
        (units > 0.0).then(|| seconds / (0.3 * units))
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use super::*;

    /// A clock that a test sets.
    #[derive(Clone, Default)]
    struct FakeClock(Rc<Cell<Duration>>);

    impl FakeClock {
        fn pass(&self, seconds: f64) {
            self.0.set(self.0.get() + Duration::from_secs_f64(seconds));
        }
    }

    impl Clock for FakeClock {
        fn now(&self) -> Duration {
            self.0.get()
        }
    }

    /// A piece of work as a machine does it.
    struct Piece {
        kind: usize,
        units: f64,
        seconds: f64,
        ends_step: bool,
    }

    /// A conversion of 30 blocks on a machine that takes `factors` times as long as usual for
    /// passes, fits, forward passes, Hessians and sweeps; shares of the whole as those of the demo.
    fn conversion(factors: [f64; 5]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let mut add = |kind: usize, seconds: f64, ends_step| {
            pieces.push(Piece {
                kind,
                units: seconds,
                seconds: seconds * factors[kind],
                ends_step,
            });
        };
        // A trial, which costs about as much as the real work.
        for _ in 0..3 {
            add(1, 0.02, false);
            add(4, 0.02, true);
        }
        (0..16).for_each(|_| add(0, 10.0, true));
        (0..30).for_each(|_| add(1, 2.0, true));
        add(1, 12.0, false);
        add(4, 15.0, false);
        for _ in 0..30 {
            [(2, 0.8), (3, 1.0), (4, 1.5), (2, 0.7), (4, 1.0)]
                .into_iter()
                .for_each(|(kind, seconds)| add(kind, seconds, false));
            add(2, 0.5, true);
        }
        pieces
    }

    /// The largest relative error of all estimates after the first tenth and before the last
    /// hundredth of the time.
    fn worst(pieces: &[Piece]) -> f64 {
        let clock = FakeClock::default();
        let mut estimate = Estimate::new(clock.clone());
        for kind in 0..5 {
            let units = pieces.iter().filter(|p| p.kind == kind).map(|p| p.units).sum();
            let family = usize::from([1, 4].contains(&kind));
            estimate.plan(kind, Planned { units, usual_cost: 1.0, family });
        }
        assert_eq!(estimate.left(), None);
        estimate.begin();
        let total: f64 = pieces.iter().map(|piece| piece.seconds).sum();
        let mut worst = 0.0_f64;
        for piece in pieces {
            clock.pass(piece.seconds);
            estimate.worked(piece.kind, piece.units);
            if piece.ends_step {
                estimate.step();
            }
            let left = total - clock.now().as_secs_f64();
            if left < 0.9 * total && left > 0.01 * total {
                let told = estimate.left().expect("something was measured").as_secs_f64();
                worst = worst.max((told / left - 1.0).abs());
            }
        }
        assert_eq!(estimate.left().map(|left| left.as_secs()), Some(0));
        worst
    }

    #[test]
    fn estimate_is_within_a_quarter_after_the_first_tenth_on_many_machines() {
        for (machine, factors) in [
            ("as usual", [1.0; 5]),
            ("four times faster", [0.25; 5]),
            ("ten times slower", [10.0; 5]),
            ("slow sweeps", [1.0, 1.0, 1.0, 1.0, 3.0]),
            ("slow rounding in all", [1.0, 4.0, 1.0, 1.0, 4.0]),
            ("slow forward passes", [1.0, 1.0, 1.5, 1.0, 1.0]),
            ("slow Hessians", [1.0, 1.0, 1.0, 2.0, 1.0]),
            ("slow matrix products", [5.0, 1.0, 5.0, 5.0, 1.0]),
            ("fast matrix products", [0.2, 1.0, 0.2, 0.2, 1.0]),
        ] {
            let worst = worst(&conversion(factors));
            assert!(worst < 0.25, "{machine}: {worst}");
        }
    }

    #[test]
    fn cold_start_is_not_the_rule() {
        let mut pieces = conversion([1.0; 5]);
        // The first trial, the first batch, and the first block of the second walk.
        for piece in [0, 1, 6, 54] {
            pieces[piece].seconds *= 4.0;
        }
        assert!(worst(&pieces) < 0.25);
    }

    #[test]
    fn machine_that_slows_down_is_noticed() {
        let clock = FakeClock::default();
        let mut estimate = Estimate::new(clock.clone());
        estimate.plan(0, Planned { units: 200.0, usual_cost: 1.0, family: 0 });
        for step in 0..100 {
            clock.pass(if step < 50 { 1.0 } else { 2.0 });
            estimate.worked(0, 1.0);
            estimate.step();
        }
        assert_eq!(estimate.left(), Some(Duration::from_secs(200)));
        clock.pass(30.0);
        assert_eq!(estimate.left(), Some(Duration::from_secs(170)));
        clock.pass(1000.0);
        assert_eq!(estimate.left(), Some(Duration::ZERO));
    }
}
