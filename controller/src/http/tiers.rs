//! Tiers: asked for here, filled by the planner.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bedplate_api::control::{TierSpec, TierView};
use bedplate_api::error::ErrorKind;

use super::Shared;
use super::answer::{Body, Path, Refusal};
use super::images::bootable_disk;
use super::views::View;
use crate::control::{Control, blocking, now};
use crate::records::TierRecord;
use crate::store::{Change, FAILURES, Read, StoreError, TIERS};

/// Longest name of a tier: with `-10000` behind it, it still is one label of a host name.
const MAX_NAME: usize = 50;
/// Largest target.
const MAX_TARGET: u32 = 10_000;
/// Least memory with which a distribution's kernel unpacks itself and its initrd.
const MIN_MEMORY_MIB: u64 = 64;
/// 1 TiB, which is also the most that a node agent takes.
const MAX_MEMORY_MIB: u64 = 1 << 20;

/// `GET /v1/tiers`.
pub async fn list(State(control): Shared) -> Result<Json<Vec<TierView>>, Refusal> {
    Ok(Json(View::take(&control).await?.tiers))
}

/// `GET /v1/tiers/{name}`.
pub async fn show(State(control): Shared, Path(name): Path<String>) -> Result<Json<TierView>, Refusal> {
    view(&control, &name).await.map(Json)
}

/// `POST /v1/tiers`.
pub async fn create(
    State(control): Shared,
    Body(spec): Body<TierSpec>,
) -> Result<(StatusCode, Json<TierView>), Refusal> {
    let view = keep(&control, spec, false).await?;
    Ok((StatusCode::CREATED, Json(view)))
}

/// `PUT /v1/tiers/{name}`.
pub async fn put(
    State(control): Shared,
    Path(name): Path<String>,
    Body(spec): Body<TierSpec>,
) -> Result<Json<TierView>, Refusal> {
    if spec.name != name {
        let message = format!("the path names tier {name:?}, the body {:?}", spec.name);
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    keep(&control, spec, true).await.map(Json)
}

/// `DELETE /v1/tiers/{name}`.
pub async fn delete(State(control): Shared, Path(name): Path<String>) -> Result<StatusCode, Refusal> {
    control
        .change(move |change| {
            if !change.remove(&TIERS, &name)? {
                return Err(no_tier(&name));
            }
            forget_failures(change, &name)?;
            change.event(now(), &name, "tier deleted; its VMs are stopped and removed")?;
            Ok(())
        })
        .await?;
    control.wake_planner();
    Ok(StatusCode::NO_CONTENT)
}

async fn keep(control: &Arc<Control>, spec: TierSpec, replace: bool) -> Result<TierView, Refusal> {
    check(&spec)?;
    let images = control.images.clone();
    let lease = blocking(move || images.lease()).await?;
    let digest = bootable_disk(control, &spec.image).await?;
    let name = spec.name.clone();
    control
        .change(move |change| {
            let before = change.one(&TIERS, &spec.name)?;
            if before.is_some() && !replace {
                let message = format!("tier {} exists already; `bedplate apply` changes it", spec.name);
                return Err(Refusal::new(ErrorKind::Conflict, message));
            }
            let tier = TierRecord { spec, digest };
            // Asking again is how a person says that whatever made VMs fail has been seen to.
            forget_failures(change, &tier.spec.name)?;
            if before.as_ref() != Some(&tier) {
                let verb = if before.is_some() { "changed" } else { "created" };
                change.event(now(), &tier.spec.name, format!("tier {verb}: {}", in_words(&tier)))?;
            }
            change.put(&TIERS, &tier.spec.name, &tier)?;
            Ok(())
        })
        .await?;
    drop(lease);
    control.wake_planner();
    view(control, &name).await
}

fn in_words(tier: &TierRecord) -> String {
    let spec = &tier.spec;
    let active = if spec.active { "active" } else { "not active" };
    format!(
        "{} × {} ({}), {} vCPUs and {} MiB each, {active}",
        spec.target,
        spec.image,
        tier.digest.short(),
        spec.cpus,
        spec.memory_mib
    )
}

fn forget_failures(change: &Change, tier: &str) -> Result<(), StoreError> {
    for failure in change.all(&FAILURES)?.iter().filter(|f| f.tier == tier) {
        change.remove(&FAILURES, &failure.name)?;
    }
    Ok(())
}

async fn view(control: &Arc<Control>, name: &str) -> Result<TierView, Refusal> {
    let tiers = View::take(control).await?.tiers;
    tiers.into_iter().find(|tier| tier.spec.name == name).ok_or_else(|| no_tier(name))
}

fn no_tier(name: &str) -> Refusal {
    Refusal::new(ErrorKind::NotFound, format!("there is no tier {name:?}; see `bedplate tier ls`"))
}

fn check(spec: &TierSpec) -> Result<(), Refusal> {
    let wrong = |message: String| Err(Refusal::new(ErrorKind::BadRequest, message));
    let letters = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let name = &spec.name;
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    if !starts || !name.bytes().all(letters) || name.ends_with('-') || name.len() > MAX_NAME {
        return wrong(format!(
            "{name:?} is no name for a tier: it becomes part of host names, so 1 to {MAX_NAME} lower-case letters, \
             digits and hyphens, a letter first and no hyphen last"
        ));
    }
    if !(1..=8).contains(&spec.cpus) {
        return wrong(format!("{} vCPUs are not possible: 1 to 8 are", spec.cpus));
    }
    if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&spec.memory_mib) {
        return wrong(format!(
            "{} MiB of memory are not possible: {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB} are",
            spec.memory_mib
        ));
    }
    if spec.target > MAX_TARGET {
        return wrong(format!("a target of {} is not possible: 0 to {MAX_TARGET} is", spec.target));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bedplate_api::node::DiskMode;

    use super::*;

    fn spec(name: &str) -> TierSpec {
        TierSpec {
            name: name.into(),
            image: "web".into(),
            target: 2,
            cpus: 1,
            memory_mib: 64,
            disk: DiskMode::NonPersistent,
            active: true,
        }
    }

    #[test]
    fn names_that_make_host_names_and_sizes_that_make_machines() {
        for good in ["web", "a", "w-1-x2", &"w".repeat(50)] {
            assert!(check(&spec(good)).is_ok(), "{good}");
        }
        for bad in ["", "-web", "web-", "1web", "Web", "we_b", "we.b", "wéb", "we/b", &"w".repeat(51)] {
            assert!(check(&spec(bad)).is_err(), "{bad}");
        }
        let limits = [
            (TierSpec { cpus: 0, ..spec("web") }, "1 to 8"),
            (TierSpec { cpus: 9, ..spec("web") }, "1 to 8"),
            (TierSpec { memory_mib: 63, ..spec("web") }, "64 to"),
            (TierSpec { memory_mib: (1 << 20) + 1, ..spec("web") }, "64 to 1048576"),
            (TierSpec { memory_mib: u64::MAX, ..spec("web") }, "64 to"),
            (TierSpec { target: 10_001, ..spec("web") }, "10000"),
        ];
        for (spec, words) in limits {
            assert!(check(&spec).unwrap_err().0.message.contains(words), "{spec:?}");
        }
    }
}
