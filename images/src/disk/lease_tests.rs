use std::cell::RefCell;
use std::sync::Barrier;

use bedplate_api::Digest;
use tempfile::TempDir;

use super::super::record::{names, utc};
use super::super::{Disk, DiskError, Hold, Mode};
use super::*;
use crate::fixtures::{image, noise, store};
use crate::{CHUNK_SIZE, Store};

/// Not a multiple of a chunk, nor of a cluster.
const SIZE: usize = 2 * CHUNK_SIZE + 777;

type Hook = Box<dyn FnMut() -> bool>;

thread_local! {
    /// Called at each step of this thread's takeovers; says whether the process lives on.
    static AT_STEP: RefCell<Option<Hook>> = const { RefCell::new(None) };
}

pub(in crate::disk) fn step() -> Result<(), LeaseError> {
    // Taken out while it runs, so that what it does is not a step.
    let Some(mut hook) = AT_STEP.take() else { return Ok(()) };
    let lives = hook();
    AT_STEP.set(Some(hook));
    if lives { Ok(()) } else { Err(io_at("live on in", Path::new("this test"))(io::ErrorKind::Interrupted.into())) }
}

/// A directory, and in it a store with an image.
struct Place {
    dir: TempDir,
    store: Store,
    image: Digest,
}

impl Place {
    fn new() -> Self {
        let (dir, store) = store();
        let image = image(&store, &noise(1, SIZE));
        Self { dir, store, image }
    }

    fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn create(&self, holder: impl Into<Holder>) -> Disk {
        Disk::create_shared(&self.disk(), &self.store, &self.image, &holder.into()).unwrap()
    }

    fn open(&self, holder: impl Into<Holder>) -> Result<Disk, DiskError> {
        Disk::open_shared(&self.disk(), &holder.into())
    }

    fn take_over(&self, holder: impl Into<Holder>) -> Result<Disk, DiskError> {
        Disk::take_over(&self.disk(), &holder.into())
    }

    /// The disk's files by name, without what does not change.
    fn files(&self) -> Vec<String> {
        let mut names = names(&self.disk()).unwrap();
        names.retain(|name| name.starts_with("data") || name.starts_with("map"));
        names.sort();
        names
    }
}

impl From<&str> for Holder {
    /// One that is waited for when it is dead: with a short period.
    fn from(name: &str) -> Self {
        Self::named(name).unwrap().with_period(Duration::from_millis(200)).unwrap()
    }
}

/// One that shall be found alive, however busy this host is: its first renewal ends the wait.
fn lively(name: &str) -> Holder {
    Holder::named(name).unwrap().with_period(Duration::from_secs(6)).unwrap()
}

fn lease(disk: &mut Disk) -> &mut Lease {
    let Hold::Shared(lease) = &mut disk.hold else { panic!("not shared") };
    lease
}

/// The process sleeps: nothing is renewed any more.
fn sleep(disk: &mut Disk) {
    lease(disk).stop_timer();
}

/// The process is dead: nothing is flushed, nothing given back, its locks are gone.
fn kill(mut disk: Disk) {
    sleep(&mut disk);
    let shared = &lease(&mut disk).shared;
    shared.state.store(State::Lost as u8, Ordering::Relaxed);
    shared.turn().count = u64::MAX;
}

fn byte(disk: &mut Disk, at: u64) -> u8 {
    let mut byte = [0];
    disk.read_at(&mut byte, at).unwrap();
    byte[0]
}

#[track_caller]
fn refused(result: Result<Disk, DiskError>) -> LeaseError {
    match result {
        Err(DiskError::Lease(error)) => error,
        other => panic!("{other:?}"),
    }
}

fn lost(error: &io::Error) -> Option<String> {
    match error.get_ref()?.downcast_ref()? {
        LeaseError::Lost { by, .. } => Some(by.clone()),
        _ => None,
    }
}

#[test]
fn a_second_node_is_refused_until_the_first_closes() {
    let place = Place::new();
    let mut first = place.create(lively("first/boot"));
    first.write_at(&[1; 5000], 100).unwrap();
    let error = refused(place.open("second/boot"));
    assert!(matches!(&error, LeaseError::Held { holder, .. } if holder == "first/boot"), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("since 2") && said.contains("stop the VM there") && said.contains("take the disk over"),
        "{said}"
    );
    assert!(matches!(refused(Disk::open(&place.disk())), LeaseError::Held { .. }));
    let error = refused(place.take_over("second/boot"));
    assert!(matches!(&error, LeaseError::Alive { holder, .. } if holder == "first/boot"), "{error}");
    assert!(matches!(refused(place.open("first/boot")), LeaseError::OpenHere { .. }));
    assert!(matches!(refused(place.take_over("first/boot")), LeaseError::OpenHere { .. }));
    first.flush().unwrap();
    drop(first);
    let mut second = place.open("second/boot").unwrap();
    assert_eq!((byte(&mut second, 99), byte(&mut second, 5099)), (noise(1, SIZE)[99], 1));
    drop(second);
    assert_eq!(byte(&mut Disk::open(&place.disk()).unwrap(), 5099), 1);
    assert_eq!(place.files(), ["data", "map"], "who closes leaves nothing to be copied");
    let again = Disk::create_shared(&place.disk(), &place.store, &place.image, &"third".into());
    assert!(matches!(again, Err(DiskError::Exists { .. })));
}

#[test]
fn an_opening_that_fails_holds_nothing() {
    let place = Place::new();
    drop(place.create("first/boot"));
    // As a full disk does: the claim has its name already, its holder gets none.
    let in_the_way = place.disk().join("holder.2.tmp");
    fs::create_dir(&in_the_way).unwrap();
    assert!(matches!(refused(place.open("second/boot")), LeaseError::Io { .. }));
    fs::remove_dir(in_the_way).unwrap();
    place.open("third/boot").unwrap();
}

#[test]
fn a_process_that_was_killed_is_followed_at_once_on_its_own_host_only() {
    let place = Place::new();
    let mut disk = place.create("host/boot");
    disk.write_at(&[1; 5000], 100).unwrap();
    disk.flush().unwrap();
    kill(disk);
    assert!(matches!(refused(place.open("host/next-boot")), LeaseError::Held { .. }));
    let mut disk = place.open("host/boot").unwrap();
    assert_eq!(byte(&mut disk, 5099), 1);
    assert_eq!(place.files(), ["data", "map"]);
}

#[test]
fn what_a_sleeper_writes_after_it_was_taken_over_is_never_seen() {
    let place = Place::new();
    let mut sleeper = place.create("sleeper");
    sleeper.write_at(&[1; 5000], 0).unwrap();
    sleeper.write_zeroes(8192, 4096).unwrap();
    sleeper.flush().unwrap();
    sleep(&mut sleeper);
    let mut next = place.take_over("next").unwrap();
    assert_eq!(place.files(), ["data.2", "map.2"]);
    sleeper.write_at(&[2; 5000], 0).unwrap();
    sleeper.write_at(&[2; 5000], 100_000).unwrap();
    assert_eq!(lost(&sleeper.flush().unwrap_err()).as_deref(), Some("next"));
    assert_eq!(lost(&sleeper.flush().unwrap_err()).as_deref(), Some("next"), "for good");
    assert_eq!(lost(&sleeper.write_at(&[2], 0).unwrap_err()).as_deref(), Some("next"));
    assert_eq!(lost(&sleeper.read_at(&mut [2], 0).unwrap_err()).as_deref(), Some("next"));
    assert!(matches!(sleeper.renew(), Err(LeaseError::Lost { .. })) && sleeper.reset().is_err());
    let check = |disk: &mut Disk| {
        assert_eq!((byte(disk, 4999), byte(disk, 9000)), (1, 0));
        assert_eq!(byte(disk, 100_000), noise(1, SIZE)[100_000]);
    };
    check(&mut next);
    // Its end gives nothing back that it has not.
    drop(sleeper);
    assert!(matches!(refused(place.open("third")), LeaseError::Held { .. }));
    next.write_at(&[3], 7).unwrap();
    next.flush().unwrap();
    drop(next);
    let mut third = place.open("third").unwrap();
    check(&mut third);
    assert_eq!(byte(&mut third, 7), 3);
}

#[test]
fn a_sleeper_that_wakes_at_any_step_of_a_takeover_loses_nothing_that_it_was_told_is_safe() {
    let place = Place::new();
    let mut sleeper = place.create("sleeper");
    sleeper.write_at(&[1; 5000], 0).unwrap();
    sleeper.flush().unwrap();
    sleep(&mut sleeper);
    let disk = std::rc::Rc::new(RefCell::new(sleeper));
    let (writer, mut at) = (std::rc::Rc::clone(&disk), 0);
    let steps = std::rc::Rc::new(RefCell::new(0));
    let counted = std::rc::Rc::clone(&steps);
    AT_STEP.set(Some(Box::new(move || {
        let mut disk = writer.borrow_mut();
        // The first write may still be let through, no flush is.
        let _ = disk.write_at(&[9; 4096], 8192 + at);
        assert!(lost(&disk.flush().unwrap_err()).is_some());
        // As if it had not noticed: a sleeper may be anywhere in its own flush.
        disk.overlay.write_at(&[9; 4096], 8192 + at).unwrap();
        disk.overlay.flush().unwrap();
        at += 4096;
        *counted.borrow_mut() += 1;
        true
    })));
    let mut next = place.take_over("next").unwrap();
    AT_STEP.set(None);
    assert!(*steps.borrow() >= 6, "{steps:?}");
    assert_eq!(byte(&mut next, 4999), 1);
    let (mut before, mut after) = (vec![0; SIZE], vec![0; SIZE]);
    next.read_at(&mut before, 0).unwrap();
    disk.borrow_mut().overlay.write_at(&[7; SIZE], 0).unwrap();
    disk.borrow_mut().overlay.flush().unwrap();
    next.read_at(&mut after, 0).unwrap();
    assert!(before == after);
}

#[test]
fn a_takeover_that_dies_at_any_step_is_finished_by_the_next() {
    let mut steps = 0;
    for last in 0.. {
        let place = Place::new();
        let mut first = place.create("first");
        first.write_at(&[1; 5000], 0).unwrap();
        first.flush().unwrap();
        sleep(&mut first);
        let mut left = last;
        AT_STEP.set(Some(Box::new(move || {
            left -= 1;
            left >= 0
        })));
        let second = place.take_over("second");
        AT_STEP.set(None);
        if second.is_ok() {
            break;
        }
        steps += 1;
        // By the same host after a restart, which may have to wait, or by a third.
        let mut third =
            if last % 2 == 0 { place.take_over("second").unwrap() } else { place.take_over("third").unwrap() };
        first.write_at(&[2; 5000], 0).unwrap_or_default();
        assert!(first.flush().is_err());
        assert_eq!(byte(&mut third, 4999), 1, "died at step {last}");
        third.write_at(&[3], 0).unwrap();
        third.flush().unwrap();
        drop(third);
        let mut fourth = place.open("fourth").unwrap();
        assert_eq!((byte(&mut fourth, 0), byte(&mut fourth, 1)), (3, 1), "died at step {last}");
        assert_eq!(place.files().len(), 2, "died at step {last}: {:?}", place.files());
        assert!(!place.files().contains(&"data".to_owned()), "the first still has these open");
    }
    assert!(steps >= 6, "{steps}");
}

#[test]
fn of_many_who_claim_one_succeeds() {
    let place = Place::new();
    for held in [false, true] {
        let first = if held {
            Some(place.open("first").unwrap())
        } else {
            drop(place.create("first"));
            None
        };
        first.into_iter().for_each(kill);
        let (start, answered) = (Barrier::new(8), Barrier::new(8));
        let claim = |number: usize| {
            start.wait();
            let result = place.take_over(lively(&format!("node-{number}")));
            answered.wait();
            match result {
                Ok(_) => 1,
                Err(DiskError::Lease(LeaseError::Alive { .. })) => 0,
                Err(other) => panic!("{other}"),
            }
        };
        let won: usize = thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|number| {
                    scope.spawn({
                        let claim = &claim;
                        move || claim(number)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(won, 1, "held: {held}");
    }
}

#[test]
fn a_lease_that_cannot_be_renewed_stops_writes_until_it_can() {
    let place = Place::new();
    let mut disk = place.create("first");
    sleep(&mut disk);
    let shared = Arc::clone(&lease(&mut disk).shared);
    // What no renewal can replace, and no ENOENT either.
    let next = Token { epoch: shared.epoch, count: Some(shared.turn().count + 1) }.path(&place.disk());
    fs::create_dir(&next).unwrap();
    assert!(disk.flush().is_err());
    assert!(shared.tick());
    disk.write_at(&[1], 0).unwrap();
    shared.turn().renewed -= 2 * shared.period;
    assert!(shared.tick());
    let error = disk.write_at(&[2], 0).unwrap_err().to_string();
    assert!(error.contains("check the shared file system"), "{error}");
    assert!(disk.discard(0, 1).is_err());
    assert_eq!(byte(&mut disk, 0), 1);
    fs::remove_dir(&next).unwrap();
    assert!(shared.tick());
    disk.write_at(&[2], 0).unwrap();
    disk.flush().unwrap();
}

#[test]
fn whatever_is_wrong_with_the_directory_is_said() {
    let place = Place::new();
    let name = |token: Token| token.path(&place.disk());
    kill(place.create("first"));
    let held = Token { epoch: 1, count: Some(1) };
    assert!(name(held).exists(), "{:?}", names(&place.disk()));
    let wrong = |what: &str, damage: &dyn Fn(), undo: &dyn Fn()| {
        damage();
        for result in [place.open("second"), place.take_over("second")] {
            let error = refused(result);
            assert!(matches!(error, LeaseError::Bad { .. }), "{what}: {error}");
        }
        undo();
    };
    let moved = |to: PathBuf| {
        let from = name(held);
        wrong(&to.display().to_string(), &|| fs::rename(&from, &to).unwrap(), &|| fs::rename(&to, &from).unwrap());
    };
    moved(place.disk().join("lease.1"));
    moved(place.disk().join("lease.1.-1"));
    moved(place.disk().join("gone"));
    moved(name(Token { epoch: u64::MAX, count: None }));
    let other = name(Token { epoch: 4, count: None });
    wrong("two", &|| fs::write(&other, "").unwrap(), &|| fs::remove_file(&other).unwrap());
    let map = place.disk().join("map");
    let aside = place.disk().join("aside");
    let record = Record::path(&place.disk(), 1);
    let whole = fs::read_to_string(&record).unwrap();
    let long = "x".repeat(65);
    for damaged in [
        "",
        "{}",
        "\0\0",
        &whole[1..],
        &whole.replace("first", ""),
        &whole.replace("first", &long),
        &whole.replace("first", "a\\u001bb"),
        &whole.replace("200", "1"),
        &whole.replace("200", "18446744073709551615"),
        &whole.replace("\"schema\":1", "\"schema\":2"),
        &" ".repeat(1 << 20),
    ] {
        assert_ne!(damaged, whole);
        wrong(damaged, &|| fs::write(&record, damaged).unwrap(), &|| fs::write(&record, &whole).unwrap());
    }
    fs::rename(&map, &aside).unwrap();
    assert!(matches!(refused(place.take_over("second")), LeaseError::Bad { .. }));
    fs::rename(&aside, &map).unwrap();
    let original = fs::read(&map).unwrap();
    fs::write(&map, [&[1], &original[1..]].concat()).unwrap();
    assert!(matches!(place.take_over("third"), Err(DiskError::Damaged { path, .. }) if path == map));
    fs::write(&map, original).unwrap();
    // Another node may put links where the next files are to be made. Each attempt is an epoch of its own.
    let (outside, epoch) = (place.dir.path().join("outside"), Token::look(&place.disk()).unwrap().epoch);
    fs::write(&outside, "not ours").unwrap();
    for (later, link) in (1..).zip(["holder.{}.tmp", "map.{}.tmp", "data.{}"]) {
        let link = place.disk().join(link.replace("{}", &(epoch + later).to_string()));
        std::os::unix::fs::symlink(&outside, link).unwrap();
        place.take_over("third").unwrap_err();
    }
    assert_eq!(fs::read_to_string(&outside).unwrap(), "not ours");
    place.take_over("third").unwrap();
}

#[test]
fn a_disk_is_shared_or_it_is_not() {
    let place = Place::new();
    let local = Disk::create(&place.disk(), &place.store, &place.image, Mode::Persistent).unwrap();
    drop(local);
    assert!(!fs::read_to_string(place.disk().join("disk.json")).unwrap().contains("shared"), "older programs read it");
    assert!(matches!(place.open("first"), Err(DiskError::NotShared { .. })));
    assert!(matches!(place.take_over("first"), Err(DiskError::NotShared { .. })));
    drop(Disk::open(&place.disk()).unwrap());
    assert_eq!(names(&place.disk()).unwrap().len(), 3);
}

#[test]
fn holders_have_names_and_periods_within_limits() {
    let host = Holder::this_host().unwrap();
    assert_eq!(host, Holder::this_host().unwrap());
    assert!(host.name.len() > 36, "a boot's id has 36 characters: {host:?}");
    for name in ["", "with space", "ü", &"x".repeat(65)] {
        assert!(matches!(Holder::named(name), Err(LeaseError::BadName)), "{name}");
    }
    for period in [Duration::from_millis(99), Duration::from_secs(3601)] {
        assert!(matches!(host.clone().with_period(period), Err(LeaseError::BadPeriod)));
    }
}

#[test]
fn names_are_read_as_they_are_written_and_in_no_other_way() {
    for token in [Token { epoch: 0, count: None }, Token { epoch: u64::MAX, count: Some(7) }] {
        let path = token.path(Path::new(""));
        assert_eq!(Token::parse(path.to_str().unwrap().strip_prefix("lease.").unwrap()), Some(token));
    }
    for wrong in ["", "1", "1.", ".1", "01.1", "1.+1", "1.1.1", "1.Free", "18446744073709551616.1", "1.-1"] {
        assert_eq!(Token::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn times_are_those_of_the_calendar() {
    assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
    assert_eq!(utc(951_827_696), "2000-02-29 12:34:56 UTC");
    assert_eq!(utc(4_107_542_400), "2100-03-01 00:00:00 UTC");
    assert_eq!(utc(u64::MAX), "9999-12-31 23:59:59 UTC");
}
