//! Programs and filters of others on our interfaces: they go on working, and so do ours.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::programs::links::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};
use flannel_agent::domain::host_state::Datapath;
use flannel_agent::host::udp::object;
use flannel_agent::host::udp::programs::{
    self, Hook, LinkPin, Order, PinFolder, Programs, Side, ensure_bpffs,
};
use flannel_common::tunnel::Settings;

use crate::rig::{Rig, UNDERLAY};
use crate::tiers::{INGRESS, has_xdp, tcx};

/// Somebody else's object: ours with settings that no packet fits, so that it lets everything pass.
fn stranger() -> Result<Ebpf> {
    // A network that is nobody's: of 0.0.0.0/0 every marked packet would be.
    let settings = Settings { network: u32::MAX, network_mask: u32::MAX, ..Settings::default() };
    Ok(EbpfLoader::new().btf(None).override_global("SETTINGS", &settings, true).load(object::OBJECT)?)
}

/// Attaches a foreign classifier in front of all others; returns its id. It stays until `Ebpf` is dropped.
fn attach_stranger(ebpf: &mut Ebpf) -> Result<u32> {
    let program: &mut SchedClassifier = ebpf.program_mut("flannel_ingress").context("program")?.try_into()?;
    program.load()?;
    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
    program.attach_with_options(UNDERLAY, TcAttachType::Ingress, order)?;
    Ok(program.info()?.id())
}

pub(crate) fn foreign_tc() -> Result<()> {
    let rig = Rig::new()?;
    let mut early = stranger()?;
    let (early, id) = rig.b.run(move |_| {
        let id = attach_stranger(&mut early);
        (early, id)
    });
    let early_id = id?;
    rig.up(Datapath::Ebpf)?;
    let programs = tcx(&rig.b, UNDERLAY, INGRESS)?;
    ensure!(programs.len() == 2 && programs[1] == early_id, "ours is first: {programs:?}");
    rig.talks()?;

    let mut late = stranger()?;
    let (late, id) = rig.b.run(move |_| {
        let id = attach_stranger(&mut late);
        (late, id)
    });
    let late_id = id?;
    rig.b.disturbed_within(Duration::from_secs(1))?;
    ensure!(!rig.b.is_in_place()?, "the place is not missed");
    rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
    ensure!(rig.b.is_in_place()?);
    let programs = tcx(&rig.b, UNDERLAY, INGRESS)?;
    ensure!(programs.len() == 3 && programs[1..] == [late_id, early_id], "ours is first: {programs:?}");
    let reason = rig.b.report()?.reason;
    ensure!(reason.ends_with("; displaced once by another program, first again"), "{reason}");
    rig.talks()?;

    rig.b.remove(Datapath::Ebpf)?;
    ensure!(tcx(&rig.b, UNDERLAY, INGRESS)? == [late_id, early_id]);
    drop((early, late));
    Ok(())
}

/// Another agent that also wants to be first: after a few rounds it is, and packets flow on all the while.
pub(crate) fn contested() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    let flood = rig.flood()?;
    let mut others = Vec::new();
    for _ in 0..3 {
        let mut other = stranger()?;
        let (other, id) = rig.b.run(move |_| {
            let id = attach_stranger(&mut other);
            (other, id)
        });
        others.push((other, id?));
        ensure!(!rig.b.is_in_place()?, "the place is not missed");
        rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
        ensure!(rig.b.is_in_place()?);
    }
    let mut last = stranger()?;
    let (last, id) = rig.b.run(move |_| {
        let id = attach_stranger(&mut last);
        (last, id)
    });
    let id = id?;
    ensure!(rig.b.is_in_place()?, "it works all the same, and repairing has an end");
    rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
    ensure!(tcx(&rig.b, UNDERLAY, INGRESS)?.first() == Some(&id));
    let reason = rig.b.report()?.reason;
    ensure!(reason.ends_with(&format!("; BPF program {id} runs before ours on ingress of eth0")), "{reason}");
    flood.end_complete(&rig)?;
    drop((others, last));
    Ok(())
}

pub(crate) fn foreign_xdp() -> Result<()> {
    let rig = Rig::new()?;
    let mut foreign = stranger()?;
    let foreign = rig.b.run(move |_| -> Result<Ebpf> {
        let program: &mut Xdp = foreign.program_mut("flannel_pass").context("program")?.try_into()?;
        program.load()?;
        program.attach(UNDERLAY, XdpMode::Driver)?;
        Ok(foreign)
    })?;
    rig.up(Datapath::Ebpf)?;
    let report = rig.b.report()?;
    ensure!(report.tier.name() == "tc+gro", "{report:?}");
    ensure!(report.reason.starts_with("another XDP program is on eth0: "), "{}", report.reason);
    rig.talks()?;
    rig.b.remove(Datapath::Ebpf)?;
    ensure!(has_xdp(&rig.b)?, "the foreign program is gone");
    // When it leaves, XDP is ours.
    rig.b.up(Datapath::Ebpf)?;
    ensure!(rig.b.is_in_place()? && rig.b.tier()? == "tc+gro");
    rig.b.run(move |_| drop(foreign));
    ensure!(!rig.b.is_in_place()?, "the free place is not seen");
    rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
    ensure!(rig.b.tier()? == "xdp" && rig.b.is_in_place()?, "{:?}", rig.b.report()?);
    rig.talks()
}

/// Another tunnel of this host puts its program in front of ours, replaces it, moves it and takes it away, as fast as it
/// can: none of what is between two of its system calls makes it somebody else's.
pub(crate) fn sibling() -> Result<()> {
    const ROUNDS: usize = 50;
    let rig = Rig::new()?;
    let bpffs = rig.b.bpffs.clone();
    rig.b.run(move |_| -> Result<()> {
        ensure_bpffs(&bpffs)?;
        let settings =
            |port: u16| Settings { network: u32::MAX, network_mask: u32::MAX, port, ..Settings::default() };
        let load = |device: &str, port| -> Result<(Programs, PinFolder)> {
            let pins = PinFolder::new(&bpffs, device);
            pins.prepare(&bpffs)?;
            Ok((Programs::load(settings(port), &pins)?.0, pins))
        };
        let (mut ours, pins) = load("flannel0", 1)?;
        let kind = ours.attach_tc(programs::INGRESS, &ingress()?, &pins)?;
        let ((mut first, theirs), (mut second, _)) = (load("flannel1", 2)?, load("flannel1", 3)?);
        let ended = AtomicBool::new(false);
        // Threads are in the network namespace of the one that starts them.
        thread::scope(|scope| {
            let comes_and_goes = scope.spawn(|| -> Result<()> {
                let hook = ingress()?;
                for _ in 0..ROUNDS {
                    first.attach_tc(programs::INGRESS, &hook, &theirs)?;
                    second.attach_tc(programs::INGRESS, &hook, &theirs)?;
                    first.attach_in_front(programs::INGRESS, kind, &hook, &theirs)?;
                    theirs.remove_link(hook.pin)?;
                }
                Ok(())
            });
            let watches = scope.spawn(|| -> Result<usize> {
                let (hook, mut looks) = (ingress()?, 0);
                while !ended.load(Ordering::Relaxed) {
                    let ahead = ours.ahead_of(programs::INGRESS, kind, &hook, &pins);
                    ensure!(
                        ahead.is_none(),
                        "look {looks}: a stranger is {}",
                        ahead.map(|a| a.what).unwrap_or_default()
                    );
                    looks += 1;
                }
                Ok(looks)
            });
            let gone = comes_and_goes.join();
            ended.store(true, Ordering::Relaxed);
            let looks = watches.join().map_err(|_| anyhow!("the watcher panicked"))??;
            gone.map_err(|_| anyhow!("the sibling panicked"))??;
            ensure!(looks > ROUNDS, "{looks} looks");
            Ok(())
        })
    })
}

/// Where packets come in, asked for inside a node.
fn ingress() -> Result<Hook<'static>> {
    Ok(Hook {
        device: UNDERLAY,
        ifindex: nix::net::if_::if_nametoindex(UNDERLAY)?,
        side: Side::Ingress,
        order: Order::First,
        pin: LinkPin::Ingress,
        handle: programs::ALONE,
    })
}

pub(crate) fn clsact() -> Result<()> {
    let rig = Rig::new()?;
    rig.b.command("tc", &format!("qdisc add dev {UNDERLAY} clsact"))?;
    rig.b.command(
        "tc",
        &format!("filter add dev {UNDERLAY} ingress priority 60 protocol ip u32 match u32 0 0 flowid 1:1"),
    )?;
    let pins = PinFolder::new(&rig.b.bpffs, "clsact");
    let bpffs = rig.b.bpffs.clone();
    rig.b.run(move |_| -> Result<()> {
        pins.prepare(&bpffs)?;
        let hook = ingress()?;
        let kind = programs::TcKind::Clsact;
        for generation in 1..=2_u32 {
            let settings = Settings { local: generation, ..Settings::default() };
            let (mut programs, _maps) = Programs::load(settings, &pins)?;
            ensure!(
                programs.check_tc(programs::INGRESS, kind, &hook, &pins).is_err(),
                "not yet {generation}"
            );
            programs.attach_clsact(programs::INGRESS, &hook)?;
            programs.check_tc(programs::INGRESS, kind, &hook, &pins).map_err(|e| anyhow!(e))?;
        }
        Ok(())
    })?;
    let show = || rig.b.command("tc", &format!("filter show dev {UNDERLAY} ingress"));
    let filters = show()?;
    ensure!(
        filters.matches("handle 0x1 flannel_ingress").count() == 1 && filters.contains("pref 50 "),
        "{filters}"
    );
    ensure!(filters.contains("pref 60 u32"), "{filters}");
    rig.b.run(|_| -> Result<()> {
        let hook = ingress()?;
        programs::detach_clsact(programs::INGRESS, &hook)?;
        programs::detach_clsact(programs::INGRESS, &hook)?;
        Ok(())
    })?;
    let filters = show()?;
    ensure!(!filters.contains("flannel") && filters.contains("pref 60 u32"), "{filters}");
    Ok(())
}
