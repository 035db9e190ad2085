//! The page for people: rendered here, whole, at each request. It is readable without its script; with it, the content is
//! exchanged every two seconds without a flicker.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bedplate_api::control::{Event, NodeState, NodeView, PoolKind, TierView, VmView};
use bedplate_api::node::VmPhase;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::control::now;
use crate::http::Shared;
use crate::http::answer::Refusal;
use crate::http::views::View;
use crate::store::EVENTS;

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/refresh.js");
/// Only what is in the page itself may run or be loaded, and it may talk to nobody but its own server.
const POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'";
/// Newest events shown.
const EVENTS_SHOWN: usize = 40;

/// `GET /`.
pub async fn page(State(control): Shared) -> Result<Response, Refusal> {
    let view = View::take(&control).await?;
    let mut events: Vec<Event> = control.read(|snapshot| snapshot.latest(&EVENTS, EVENTS_SHOWN)).await?;
    events.reverse();
    let headers = [(header::CONTENT_SECURITY_POLICY, POLICY), (header::CACHE_CONTROL, "no-store")];
    Ok((headers, render(&view, &events, now())).into_response())
}

/// The whole page. `events` newest first; `now` in seconds since 1970.
fn render(view: &View, events: &[Event], now: u64) -> Markup {
    let colours = colours(view);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Bedplate" }
                noscript { meta http-equiv="refresh" content="5"; }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header { h1 { "Bedplate" } (summary(view)) }
                main {
                    section { h2 { "Nodes and their slots" } (nodes(view, &colours)) }
                    section { h2 { "Tiers" } (tiers(&view.tiers, &colours)) }
                    section { h2 { "Free pool" } (pool(view)) }
                    section.wide { h2 { "Virtual machines" } (vms(&view.vms, &colours)) }
                    section.wide { h2 { "Decisions and events" } (event_list(events, now)) }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    }
}

/// A hue for each tier: neighbours in the list are as far apart as can be, however many there are.
fn colours(view: &View) -> BTreeMap<&str, usize> {
    let names = view.tiers.iter().map(|t| t.spec.name.as_str()).chain(view.vms.iter().map(|vm| vm.tier.as_str()));
    let mut colours = BTreeMap::new();
    for name in names {
        let next = colours.len();
        // 137 degrees: the golden angle.
        colours.entry(name).or_insert(205 + next * 137);
    }
    colours
}

fn hue(colours: &BTreeMap<&str, usize>, tier: &str) -> String {
    format!("--hue:{}", colours.get(tier).copied().unwrap_or(0) % 360)
}

fn summary(view: &View) -> Markup {
    let ready = view.nodes.iter().filter(|n| n.state == NodeState::Ready).count();
    let running = view.vms.iter().filter(|vm| vm.phase == VmPhase::Running).count();
    let wanted: u64 = view.tiers.iter().filter(|t| t.spec.active).map(|t| u64::from(t.spec.target)).sum();
    let free = view.pool.iter().filter(|p| p.kind == PoolKind::Virtual).count();
    html! {
        dl.summary {
            div { dt { "nodes ready" } dd { (ready) small { " of " (view.nodes.len()) } } }
            div { dt { "VMs running" } dd { (running) small { " of " (wanted) } } }
            div { dt { "slots free" } dd { (free) } }
        }
    }
}

fn nodes(view: &View, colours: &BTreeMap<&str, usize>) -> Markup {
    if view.nodes.is_empty() {
        return html! { p.empty { "No machine has asked to be booted and none has registered." } };
    }
    html! {
        @for node in &view.nodes {
            article.node data-state=(state_word(node.state)) {
                h3 {
                    (node.name) " " span.badge { (state_word(node.state)) }
                    small { @if let Some(address) = node.address { (address) } }
                }
                p.facts { (facts(node)) }
                ol.slots { (slots(node, &view.vms, colours)) }
            }
        }
    }
}

fn facts(node: &NodeView) -> String {
    let size = node.capacity.as_ref().map(|c| format!("{} processors · {} MiB", c.cpus, c.memory_mib));
    let mac = node.mac.as_deref().unwrap_or("MAC not known");
    format!("{} · {mac} · heard of {} s ago", size.as_deref().unwrap_or("size not known"), node.last_seen_seconds)
}

fn slots(node: &NodeView, vms: &[VmView], colours: &BTreeMap<&str, usize>) -> Markup {
    let count = if node.state == NodeState::Ready { node.capacity.as_ref().map_or(0, |c| c.slots) } else { 0 };
    let here: BTreeMap<u32, &VmView> = vms.iter().filter(|vm| vm.node == node.name).map(|vm| (vm.slot, vm)).collect();
    html! {
        @for slot in 0..count {
            @match here.get(&slot) {
                Some(vm) => li data-phase=(phase_word(vm.phase)) style=(hue(colours, &vm.tier)) title=(vm.detail.as_deref().unwrap_or("")) {
                    b { (vm.name) } small { (progress(vm)) }
                },
                None => li.free { b { (slot) } small { "free" } },
            }
        }
    }
}

/// Where a VM stands, with figures where it is being copied.
fn progress(vm: &VmView) -> String {
    let phase = phase_word(vm.phase);
    match vm.copy {
        Some(copy) => {
            let percent = u128::from(copy.done) * 100 / u128::from(copy.total.max(1));
            // A VM may run before its image is here whole.
            let copying = if vm.phase == VmPhase::Copying { "" } else { ", copying" };
            format!("{phase}{copying} {percent} %")
        }
        None => phase.to_owned(),
    }
}

fn tiers(tiers: &[TierView], colours: &BTreeMap<&str, usize>) -> Markup {
    if tiers.is_empty() {
        return html! { p.empty { "No tier yet: " code { "bedplate tier create" } " makes one." } };
    }
    let share =
        |part: u32, whole: u32| format!("width:{}%", u64::from(part.min(whole)) * 100 / u64::from(whole.max(1)));
    html! {
        @for tier in tiers {
            article.tier style=(hue(colours, &tier.spec.name)) data-active=(tier.spec.active) {
                h3 {
                    (tier.spec.name) " "
                    @if !tier.spec.active { span.badge { "not active" } }
                    small { (tier.running) " running, " (tier.assigned) " assigned of " (tier.spec.target) }
                }
                div.bar {
                    span.assigned style=(share(tier.assigned, tier.spec.target)) {}
                    span.running style=(share(tier.running, tier.spec.target)) {}
                }
                p.facts {
                    (tier.spec.image) " (" (tier.digest.short()) ") · " (tier.spec.cpus) " vCPUs · " (tier.spec.memory_mib) " MiB"
                }
                @if let Some(detail) = &tier.detail { p.detail { (detail) } }
            }
        }
    }
}

fn pool(view: &View) -> Markup {
    if view.pool.is_empty() {
        return html! { p.empty { "Nothing is free." } };
    }
    html! {
        ul.pool {
            @for entry in &view.pool {
                @match entry.kind {
                    PoolKind::Physical => li.physical { (entry.name) small { " physical" } },
                    PoolKind::Virtual => li { (entry.name) small { " virtual" } },
                }
            }
        }
    }
}

fn vms(vms: &[VmView], colours: &BTreeMap<&str, usize>) -> Markup {
    if vms.is_empty() {
        return html! { p.empty { "No VM holds a slot." } };
    }
    html! {
        div.scroll { table {
            thead { tr { th { "VM" } th { "slot" } th { "stands" } th { "address" } th { "restarts" } th { "why" } } }
            tbody {
                @for vm in vms {
                    tr {
                        td { span.dot style=(hue(colours, &vm.tier)) {} (vm.name) }
                        td { (vm.node) "/" (vm.slot) }
                        td { span.phase data-phase=(phase_word(vm.phase)) { (progress(vm)) } }
                        td { @if let Some(address) = vm.address { a href={ "http://" (address) "/" } rel="noreferrer" { (address) } } }
                        td.number { (vm.restarts) }
                        td.why { (vm.detail.as_deref().unwrap_or("")) }
                    }
                }
            }
        } }
    }
}

fn event_list(events: &[Event], now: u64) -> Markup {
    if events.is_empty() {
        return html! { p.empty { "Nothing has happened yet." } };
    }
    html! {
        ol.events {
            @for event in events {
                li { time { (ago(now.saturating_sub(event.time))) } b { (event.subject) } span { (event.message) } }
            }
        }
    }
}

fn ago(seconds: u64) -> String {
    match seconds {
        0..=119 => format!("{seconds} s"),
        120..=7199 => format!("{} min", seconds / 60),
        7200..=172_799 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

const fn state_word(state: NodeState) -> &'static str {
    match state {
        NodeState::Blank => "blank",
        NodeState::Booting => "booting",
        NodeState::Ready => "ready",
        NodeState::Lost => "lost",
    }
}

const fn phase_word(phase: VmPhase) -> &'static str {
    match phase {
        VmPhase::Pending => "pending",
        VmPhase::Copying => "copying",
        VmPhase::Starting => "starting",
        VmPhase::Running => "running",
        VmPhase::Stopping => "stopping",
        VmPhase::Stopped => "stopped",
        VmPhase::BackOff => "back-off",
        VmPhase::Failed => "failed",
    }
}
