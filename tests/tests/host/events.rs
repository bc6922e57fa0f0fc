//! Damage by others is noticed within a second, our own changes are not, and lost events count.

use super::*;

pub(crate) async fn damage() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        address("10.5.3.0/32"),
        HostItem::Route(plain("10.5.0.0/16", None, "flannel0")),
        route("10.5.9.0/24", "10.9.0.2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    let missing = [
        ("route del 10.5.9.0/24", vec![Key::Route("10.5.9.0/24".parse().unwrap())]),
        // With its last address a device stops speaking IPv4, and loses its routes.
        (
            "addr del 10.5.3.0/32 dev flannel0",
            vec![
                Key::Address("flannel0".into(), "10.5.3.0/32".parse().unwrap()),
                Key::Route("10.5.0.0/16".parse().unwrap()),
            ],
        ),
        // No word from the kernel about the routes that go with a device; the device's own news must do.
        ("link set under0 down", vec![Key::Route("10.5.9.0/24".parse().unwrap())]),
        (
            "link del flannel0",
            vec![
                Key::Link("flannel0".into()),
                Key::Address("flannel0".into(), "10.5.3.0/32".parse().unwrap()),
                Key::Route("10.5.0.0/16".parse().unwrap()),
            ],
        ),
        (
            "route replace 10.5.9.0/24 via 10.9.0.66 dev under0",
            vec![Key::Route("10.5.9.0/24".parse().unwrap())],
        ),
    ];
    for (command, gone) in missing {
        quiet(&mut host).await;
        let start = Instant::now();
        ip(command);
        let woken = tokio::time::timeout(Duration::from_secs(1), host.news()).await;
        assert!(woken.is_ok(), "nobody noticed `ip {command}`");
        let found = host.observe().await?;
        println!("ip {command}: noticed after {} ms", start.elapsed().as_millis());
        for item in wanted.iter() {
            assert_eq!(found.contains(item), !gone.contains(&item.key()), "{item} after `ip {command}`");
        }
        if command == "link set under0 down" {
            ip("link set under0 up");
        }
        go(&mut host, &found, &wanted).await;
        assert_eq!(host.observe().await?, wanted, "after the repair of `ip {command}`");
    }
    Ok(())
}

pub(crate) async fn own_echo() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    let wanted = state((0..100).map(|n| route(&format!("10.5.{n}.0/24"), "10.9.0.2")));
    go(&mut host, &HostState::new(), &wanted).await;
    // A listener that has much to read slows down every change: the kernel waits for it.
    assert_eq!(unread(), 0, "bytes that nobody has read");
    let woken = tokio::time::timeout(Duration::from_millis(500), host.news()).await;
    assert!(woken.is_err(), "woken by our own routes");
    ip("route del 10.5.50.0/24");
    let woken = tokio::time::timeout(Duration::from_secs(1), host.news()).await;
    assert!(woken.is_ok(), "not woken by another's deletion");
    Ok(())
}

/// Bytes in the sockets of this namespace that listen to changes (the kernel's own columns: Groups, Rmem).
fn unread() -> u64 {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
    let sockets = sockets.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let listening = sockets.filter(|fields| fields[3] != "00000000");
    let bytes: Vec<u64> = listening.map(|fields| fields[4].parse().unwrap()).collect();
    assert!(!bytes.is_empty(), "nobody listens");
    bytes.iter().sum()
}

pub(crate) async fn overrun() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    // Another program changes more than the socket can hold while nobody reads.
    let other = Netlink::new()?;
    let routes: Vec<Route> = (0..12_000_u32)
        .map(|n| plain(&format!("10.5.{}.{}/32", n / 256, n % 256), Some("10.9.0.2"), "under0"))
        .collect();
    let routes: Vec<&Route> = routes.iter().collect();
    assert!(other.put_routes(&routes).await.iter().all(Result::is_ok));
    let drops: u64 = std::fs::read_to_string("/proc/thread-self/net/netlink")
        .unwrap()
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[3] != "00000000")
        .map(|fields| fields[8].parse::<u64>().unwrap())
        .sum();
    assert!(drops > 0, "the kernel lost nothing: the test must change more");
    println!("{drops} events lost");
    let woken = tokio::time::timeout(Duration::from_secs(1), host.news()).await;
    assert!(woken.is_ok(), "lost events went unnoticed");
    assert_eq!(host.observe().await?.len(), 12_000);
    let again = tokio::time::timeout(Duration::from_millis(1000), host.news()).await;
    assert!(again.is_err(), "woken again by what was reported");
    // And the subscription is still alive.
    ip("route del 10.5.0.7/32");
    assert!(tokio::time::timeout(Duration::from_secs(1), host.news()).await.is_ok());
    Ok(())
}

pub(crate) async fn burst() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    for n in 0..20 {
        ip(&format!("route add 10.5.{n}.0/24 via 10.9.0.2 dev under0"));
    }
    // Waits that are given up, as those of a select that another arm wins.
    for _ in 0..10 {
        let _ = tokio::time::timeout(Duration::from_millis(2), host.news()).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(500), host.news()).await.is_ok(), "forgotten");
    assert!(tokio::time::timeout(Duration::from_millis(700), host.news()).await.is_err(), "woken twice");
    Ok(())
}
