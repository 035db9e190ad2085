//! How much a device may do in a time: two token buckets, one for bytes and one for requests.
//!
//! A request is let through while both buckets have credit, however large it is, and takes what it costs; what the
//! credit does not cover is owed and refilled first. So the mean rate is exact, a burst is at most a bucket and one
//! request, and a request larger than the bucket needs no rule of its own. Where there is no limit there is neither a clock
//! nor a lock.
//!
//! Workers of one device share its buckets ([`Limiter::share`]), so that the limit is the device's however its work is
//! spread. Several of them may find the same credit; each pays, so that the mean rate stays exact, and a burst is at most a
//! bucket and one request for each worker.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::timer::Timer;

/// What one bucket is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BucketConfig {
    /// Tokens (bytes, or requests) that it holds.
    pub size: u64,
    /// Tokens that there are once, in the beginning, beyond `size`.
    pub one_time_burst: u64,
    /// In which it is refilled from empty to full.
    pub refill_time: Duration,
}

impl BucketConfig {
    /// Whether it limits anything: a bucket without size or time does not.
    const fn limits(&self) -> bool {
        self.size > 0 && !self.refill_time.is_zero()
    }
}

/// Both buckets of a device; none is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimiterConfig {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Requests.
    pub operations: Option<BucketConfig>,
}

impl LimiterConfig {
    /// No limit.
    pub const NONE: Self = Self { bandwidth: None, operations: None };
}

/// A change of a limiter that works; what is absent stays as it is. A bucket of size 0 ends a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LimiterUpdate {
    /// Bytes.
    pub bandwidth: Option<BucketConfig>,
    /// Requests.
    pub operations: Option<BucketConfig>,
}

impl LimiterUpdate {
    /// Adds a later change to this one.
    pub fn merge(&mut self, later: Self) {
        self.bandwidth = later.bandwidth.or(self.bandwidth);
        self.operations = later.operations.or(self.operations);
    }
}

#[derive(Debug)]
struct Bucket {
    size: u64,
    /// Nanoseconds in which `size` tokens come.
    refill: u128,
    burst: u64,
    /// Credit, negative for a debt.
    credit: i128,
    /// Up to when the credit has been refilled.
    since: Instant,
}

impl Bucket {
    fn new(config: BucketConfig, now: Instant) -> Option<Self> {
        config.limits().then(|| Self {
            size: config.size,
            // Five centuries are as good as for ever, and keep the products below in 128 bits.
            refill: config.refill_time.as_nanos().min(u64::MAX.into()),
            burst: config.one_time_burst,
            credit: i128::from(config.size),
            since: now,
        })
    }

    fn refill(&mut self, now: Instant) {
        // A full bucket gains nothing, not even a part of a token.
        if self.credit >= i128::from(self.size) {
            self.since = now;
            return;
        }
        let nanos = now.saturating_duration_since(self.since).as_nanos();
        if nanos >= self.refill && self.credit >= 0 {
            (self.credit, self.since) = (i128::from(self.size), now);
            return;
        }
        let tokens = nanos.min(1 << 63) * u128::from(self.size) / self.refill;
        if tokens == 0 {
            return;
        }
        // Only the time that whole tokens took, so that none is lost to rounding.
        let spent = (tokens * self.refill).div_ceil(u128::from(self.size));
        self.since += Duration::from_nanos(spent.min(nanos) as u64);
        self.credit += tokens as i128;
        if self.credit >= i128::from(self.size) {
            (self.credit, self.since) = (i128::from(self.size), now);
        }
    }

    fn has_credit(&self) -> bool {
        self.burst > 0 || self.credit > 0
    }

    fn take(&mut self, cost: u64) {
        let from_burst = cost.min(self.burst);
        self.burst -= from_burst;
        self.credit -= i128::from(cost - from_burst);
    }

    /// How long until there is credit, if it has none.
    fn wait(&self) -> Duration {
        let missing = (1 - self.credit).max(0) as u128;
        let nanos = (missing * self.refill).div_ceil(u128::from(self.size));
        Duration::from_nanos(nanos.min(u128::from(u64::MAX)) as u64)
    }
}

#[derive(Debug)]
struct Buckets {
    bandwidth: Option<Bucket>,
    operations: Option<Bucket>,
}

impl Buckets {
    /// How long the next request has to wait, if it has to.
    fn wait_at(&mut self, now: Instant) -> Option<Duration> {
        let mut wait = None;
        for bucket in [&mut self.bandwidth, &mut self.operations].into_iter().flatten() {
            bucket.refill(now);
            if !bucket.has_credit() {
                wait = wait.max(Some(bucket.wait()));
            }
        }
        wait
    }

    fn pay(&mut self, bytes: u64) {
        for (bucket, cost) in [(&mut self.bandwidth, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
    }
}

/// The limits of one direction of one device, to change them from any thread.
#[derive(Debug, Clone)]
pub struct Limits(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Whether there is a bucket at all. What is found here may be as old as the last change.
    limited: AtomicBool,
    /// Held for a few sums.
    buckets: Mutex<Buckets>,
}

impl Limits {
    /// Takes over other limits: what is given starts full, what is not goes on. A worker that waits has to be told.
    pub fn update(&self, update: &LimiterUpdate) {
        let now = Instant::now();
        let mut buckets = self.lock();
        let Buckets { bandwidth, operations } = &mut *buckets;
        for (bucket, config) in [(bandwidth, update.bandwidth), (operations, update.operations)] {
            if let Some(config) = config {
                *bucket = Bucket::new(config, now);
            }
        }
        let limited = buckets.bandwidth.is_some() || buckets.operations.is_some();
        self.0.limited.store(limited, Ordering::Relaxed);
    }

    fn is_limited(&self) -> bool {
        self.0.limited.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Buckets> {
        self.0.buckets.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// The limits of one direction of one device, as one worker has them: with the timer that says when there is credit again.
#[derive(Debug)]
pub struct Limiter {
    limits: Limits,
    timer: Timer,
}

impl Limiter {
    /// Full buckets.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn open(config: LimiterConfig) -> io::Result<Self> {
        let now = Instant::now();
        let bucket = |config: Option<BucketConfig>| config.and_then(|config| Bucket::new(config, now));
        let buckets = Buckets { bandwidth: bucket(config.bandwidth), operations: bucket(config.operations) };
        let limited = AtomicBool::new(buckets.bandwidth.is_some() || buckets.operations.is_some());
        let limits = Limits(Arc::new(Shared { limited, buckets: Mutex::new(buckets) }));
        Ok(Self { limits, timer: Timer::open()? })
    }

    /// The same buckets for another worker of the device.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn share(&self) -> io::Result<Self> {
        Ok(Self { limits: self.limits.clone(), timer: Timer::open()? })
    }

    /// To change them from any thread.
    pub fn limits(&self) -> Limits {
        self.limits.clone()
    }

    /// Whether a request of `bytes` may be done now; then it is paid for. If not, the timer is set to when it may be.
    pub fn admit(&self, bytes: u64) -> bool {
        let ready = self.ready();
        if ready {
            self.pay(bytes);
        }
        ready
    }

    /// Whether something may be done now, whose size is not known yet; [`Limiter::pay`] follows. If not, the timer is
    /// set to when it may be.
    pub fn ready(&self) -> bool {
        if !self.limits.is_limited() {
            return true;
        }
        let wait = self.limits.lock().wait_at(Instant::now());
        if let Some(wait) = wait {
            self.timer.once(wait);
        }
        wait.is_none()
    }

    /// Takes what a request of `bytes` costs.
    pub fn pay(&self, bytes: u64) {
        if self.limits.is_limited() {
            self.limits.lock().pay(bytes);
        }
    }

    /// Takes over other limits: what is given starts full, what is not goes on.
    pub fn update(&self, update: &LimiterUpdate) {
        self.limits.update(update);
    }

    /// The timer has fired: it is taken note of.
    pub fn expired(&self) {
        self.timer.expired();
    }
}

impl AsRawFd for Limiter {
    /// Readable when there is credit again.
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bandwidth: Option<(u64, u64, u64)>, operations: Option<(u64, u64, u64)>) -> Limiter {
        let bucket = |(size, one_time_burst, millis)| BucketConfig {
            size,
            one_time_burst,
            refill_time: Duration::from_millis(millis),
        };
        Limiter::open(LimiterConfig { bandwidth: bandwidth.map(bucket), operations: operations.map(bucket) }).unwrap()
    }

    /// [`Limiter::admit`] at a time of the test's choice.
    fn admit_at(limiter: &Limiter, bytes: u64, now: Instant) -> Option<Duration> {
        let wait = limiter.limits.lock().wait_at(now);
        if wait.is_none() {
            limiter.pay(bytes);
        }
        wait
    }

    /// Admits requests of `bytes` for `time` as fast as it may; how many there were.
    fn run(limiter: &Limiter, bytes: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        loop {
            match admit_at(limiter, bytes, now) {
                None => count += 1,
                Some(wait) => now += wait,
            }
            if now - start >= time {
                return count;
            }
        }
    }

    #[test]
    fn the_mean_rate_is_the_one_that_was_asked_for() {
        // 1000 requests a second, in several shapes; the bucket itself comes in addition.
        for (size, millis) in [(1000, 1000), (1, 1), (7, 7), (333, 333)] {
            let count = run(&limiter(None, Some((size, 0, millis))), 4096, Duration::from_secs(10));
            assert!((10_000..=10_000 + size + 1).contains(&count), "{size} in {millis} ms: {count}");
        }
        // 1 MiB a second by requests of 4 KiB, of 1 MiB, and of more than the bucket.
        for (bytes, expected) in [(4096, 2560), (1 << 20, 10), (4 << 20, 2)] {
            let count = run(&limiter(Some((1 << 20, 0, 1000)), None), bytes, Duration::from_secs(10));
            assert!((expected..=expected + (1 << 20) / bytes + 2).contains(&count), "{bytes}: {count}");
        }
    }

    #[test]
    fn a_full_bucket_gains_nothing() {
        let limiter = limiter(None, Some((4, 0, 200)));
        let late = Instant::now() + Duration::from_millis(45);
        assert!((0..4).all(|_| admit_at(&limiter, 1, late).is_none()));
        assert!(admit_at(&limiter, 1, late + Duration::from_millis(45)).is_some(), "a token takes 50 ms");
        assert!(admit_at(&limiter, 1, late + Duration::from_millis(50)).is_none());
    }

    #[test]
    fn a_burst_comes_once_and_both_limits_hold() {
        let both = limiter(Some((1 << 20, 1 << 22, 1000)), Some((1000, 0, 1000)));
        let now = Instant::now();
        let at_once = (0..).take_while(|_| admit_at(&both, 65536, now).is_none()).count();
        assert_eq!(at_once, 64 + 16, "the burst and the bucket");
        assert_eq!((0..).take_while(|_| admit_at(&both, 1 << 16, now + Duration::from_secs(60)).is_none()).count(), 16);
        let tight = limiter(Some((1 << 40, 0, 1)), Some((2, 0, 60_000)));
        assert_eq!(run(&tight, 512, Duration::from_secs(1)), 2);
    }

    #[test]
    fn a_bucket_without_size_or_time_is_no_limit_and_limits_change() {
        let open = limiter(Some((0, 5, 100)), Some((5, 0, 0)));
        assert!((0..1000).all(|_| open.admit(u64::MAX)));
        let bucket = BucketConfig { size: 1, one_time_burst: 0, refill_time: Duration::from_millis(1) };
        open.update(&LimiterUpdate { operations: Some(bucket), ..Default::default() });
        assert!(open.admit(1) && !open.admit(1));
        let deadline = Instant::now() + Duration::from_secs(20);
        while !open.admit(1) {
            assert!(Instant::now() < deadline, "no credit comes");
        }
        open.update(&LimiterUpdate { operations: Some(BucketConfig { size: 0, ..bucket }), ..Default::default() });
        assert!((0..10).all(|_| open.admit(1)));
    }

    #[test]
    fn workers_share_one_rate_and_a_change_reaches_all_of_them() {
        let one = limiter(None, Some((10, 0, 100)));
        let three = [one.share().unwrap(), one.share().unwrap(), one];
        let start = Instant::now();
        let (mut now, mut count) = (start, 0);
        while now - start < Duration::from_secs(10) {
            // All look before anybody pays.
            let ready: Vec<_> = three.iter().filter(|one| one.limits.lock().wait_at(now).is_none()).collect();
            ready.iter().for_each(|one| one.pay(1));
            count += ready.len();
            now += if ready.is_empty() { Duration::from_millis(1) } else { Duration::ZERO };
        }
        assert!((1000..=1000 + 10 + 3).contains(&count), "{count} instead of 100 in a second, and the bucket");
        let none = BucketConfig { size: 0, one_time_burst: 0, refill_time: Duration::ZERO };
        three[0].limits().update(&LimiterUpdate { operations: Some(none), ..Default::default() });
        assert!(three.iter().all(|one| (0..100).all(|_| one.admit(1))));
    }

    #[test]
    fn the_largest_numbers_do_not_overflow() {
        let max = (u64::MAX, u64::MAX, u64::MAX);
        let limiter = limiter(Some(max), Some((1, 0, u64::MAX)));
        let now = Instant::now();
        for time in [0, 1, 1 << 40] {
            admit_at(&limiter, u64::MAX, now + Duration::from_secs(time));
        }
        assert!(!limiter.admit(u64::MAX));
    }
}
