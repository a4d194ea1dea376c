// SPDX-License-Identifier: Apache-2.0
//! Events for containerd, in order.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use podhull_types::Deadline;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::wire::{any, timestamp};

/// Time for containerd to take one event.
const FORWARD: Duration = Duration::from_secs(5);
/// Pause before an event is sent again: nothing tells when containerd is back.
const PAUSE: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
    Duration::from_secs(2),
];
/// How often an event is sent that containerd answers with an error.
const REFUSALS: usize = 5;

/// Sends events to containerd, each until it is acknowledged, one after the
/// other. While containerd is away they wait.
#[derive(Debug)]
pub(crate) struct Publisher {
    namespace: String,
    /// `None` once it is finished.
    sending: Mutex<Option<Sending>>,
}

#[derive(Debug)]
struct Sending {
    queue: mpsc::UnboundedSender<Envelope>,
    task: JoinHandle<()>,
}

impl Publisher {
    /// Sends to the ttrpc server at `address`, a path or a `unix://` URL. With
    /// no address, events are only logged.
    pub(crate) fn start(namespace: &str, address: &str) -> Self {
        let (queue, events) = mpsc::unbounded_channel();
        let address = match address {
            "" => None,
            path if path.starts_with('/') => Some(format!("unix://{path}")),
            url => Some(url.to_owned()),
        };
        let task = tokio::spawn(send_all(address, events));
        Self {
            namespace: namespace.to_owned(),
            sending: Mutex::new(Some(Sending { queue, task })),
        }
    }

    /// Queues an event. `name` is its type's name without the package.
    pub(crate) fn publish(&self, topic: &str, name: &str, event: &impl Message) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                tracing::error!(topic, %error, "event not encoded");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: timestamp(SystemTime::now()),
            namespace: self.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(any(&format!("containerd.events.{name}"), value)),
            ..Envelope::default()
        };
        let sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = sending.as_ref().map(|sending| &sending.queue);
        if queue.is_none_or(|queue| queue.send(envelope).is_err()) {
            tracing::error!(topic, "event lost: the shim ends");
        }
    }

    /// Waits until every event is acknowledged, or the deadline passes; what is
    /// left then is dropped, and the log says so.
    pub(crate) async fn finish(&self, by: Deadline) {
        let sending = self
            .sending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(Sending { queue, mut task }) = sending else {
            return;
        };
        drop(queue);
        if by.run(&mut task).await.is_err() {
            tracing::warn!("containerd did not take all events before the shim's end");
            task.abort();
        }
    }
}

async fn send_all(address: Option<String>, mut events: mpsc::UnboundedReceiver<Envelope>) {
    let mut client = None;
    while let Some(envelope) = events.recv().await {
        let topic = envelope.topic.clone();
        match &address {
            Some(address) => send(address, &mut client, envelope).await,
            None => tracing::info!(topic, "event"),
        }
    }
}

async fn send(address: &str, client: &mut Option<EventsClient>, envelope: Envelope) {
    let topic = envelope.topic.clone();
    let mut refusals = 0;
    let mut pauses = PAUSE
        .iter()
        .copied()
        .chain(std::iter::repeat(PAUSE[PAUSE.len() - 1]));
    loop {
        match forward(address, client, &envelope).await {
            Ok(()) => {
                tracing::debug!(topic, "event acknowledged");
                return;
            }
            Err(ttrpc::Error::RpcStatus(status)) => {
                refusals += 1;
                if refusals == REFUSALS {
                    tracing::error!(topic, status = status.message(), "event refused");
                    return;
                }
            }
            Err(error) => {
                tracing::debug!(topic, %error, "event not taken");
                *client = None;
            }
        }
        tokio::time::sleep(pauses.next().unwrap_or(FORWARD)).await;
    }
}

async fn forward(
    address: &str,
    client: &mut Option<EventsClient>,
    envelope: &Envelope,
) -> ttrpc::Result<()> {
    let connected = match client {
        Some(connected) => connected,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let request = ForwardRequest {
        envelope: MessageField::some(envelope.clone()),
        ..ForwardRequest::default()
    };
    let within = i64::try_from(FORWARD.as_nanos()).unwrap_or(i64::MAX);
    let context = ttrpc::context::with_timeout(within);
    // A client that never answers would hold the event for ever.
    match tokio::time::timeout(FORWARD, connected.forward(context, &request)).await {
        Ok(answer) => answer.map(drop),
        Err(_) => Err(ttrpc::Error::Others("no answer".into())),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;
    use containerd_shim_protos::events::task::TaskStart;
    use containerd_shim_protos::protobuf::well_known_types::empty::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use tokio::io::AsyncReadExt as _;
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;

    #[derive(Default)]
    struct Containerd {
        taken: Mutex<Vec<String>>,
        /// The container whose events it does not take.
        refuses: Option<&'static str>,
        refused: Mutex<usize>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let event = TaskStart::parse_from_bytes(&request.envelope.event.value).unwrap();
            if self.refuses == Some(&event.container_id) {
                *self.refused.lock().unwrap() += 1;
                let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no such event");
                return Err(ttrpc::Error::RpcStatus(status));
            }
            self.taken.lock().unwrap().push(event.container_id);
            Ok(Empty::default())
        }
    }

    fn publish(publisher: &Publisher, id: &str) {
        let event = TaskStart {
            container_id: id.into(),
            ..TaskStart::default()
        };
        publisher.publish("/tasks/start", "TaskStart", &event);
    }

    #[tokio::test]
    async fn events_wait_for_containerd_and_come_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/events", folder.path().display());
        let publisher = Publisher::start("k8s.io", &address);
        publish(&publisher, "a");
        publish(&publisher, "b");
        let containerd = Arc::new(Containerd::default());
        let mut server = serve(&address, &containerd);
        server.start().await.unwrap();
        publish(&publisher, "c");
        publisher
            .finish(Deadline::after(Duration::from_secs(10)))
            .await;
        assert_eq!(*containerd.taken.lock().unwrap(), ["a", "b", "c"]);
        server.shutdown().await.unwrap();
    }

    fn serve(address: &str, containerd: &Arc<Containerd>) -> Server {
        let service: Arc<dyn Events + Send + Sync> = Arc::clone(containerd) as _;
        let server = Server::new().bind(address).unwrap();
        server.register_service(create_events(service))
    }

    /// containerd may have taken it, and said so to nobody: it is sent again, and what
    /// follows it waits.
    #[tokio::test]
    async fn an_event_whose_answer_is_lost_is_sent_again_in_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("events");
        let address = format!("unix://{}", socket.display());
        let dying = tokio::net::UnixListener::bind(&socket).unwrap();
        let publisher = Publisher::start("k8s.io", &address);
        publish(&publisher, "a");
        publish(&publisher, "b");
        let (mut connection, _) = dying.accept().await.unwrap();
        let mut taken = [0; 64];
        connection.read_exact(&mut taken).await.unwrap();
        drop((connection, dying));
        std::fs::remove_file(&socket).unwrap();
        let containerd = Arc::new(Containerd::default());
        let mut server = serve(&address, &containerd);
        server.start().await.unwrap();
        publisher
            .finish(Deadline::after(Duration::from_secs(10)))
            .await;
        assert_eq!(*containerd.taken.lock().unwrap(), ["a", "b"]);
        server.shutdown().await.unwrap();
    }

    /// One that containerd will never take must not hold up the others.
    #[tokio::test]
    async fn an_event_that_is_refused_again_and_again_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let address = format!("unix://{}/events", folder.path().display());
        let containerd = Arc::new(Containerd {
            refuses: Some("bad"),
            ..Containerd::default()
        });
        let mut server = serve(&address, &containerd);
        server.start().await.unwrap();
        let publisher = Publisher::start("k8s.io", &address);
        for id in ["a", "bad", "b"] {
            publish(&publisher, id);
        }
        publisher
            .finish(Deadline::after(Duration::from_secs(30)))
            .await;
        assert_eq!(*containerd.taken.lock().unwrap(), ["a", "b"]);
        assert_eq!(*containerd.refused.lock().unwrap(), REFUSALS);
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn an_absent_containerd_holds_nobody_up() {
        let publisher = Publisher::start("k8s.io", "unix:///nonexistent/events");
        publish(&publisher, "a");
        let begun = std::time::Instant::now();
        publisher
            .finish(Deadline::after(Duration::from_millis(200)))
            .await;
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
}
