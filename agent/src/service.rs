//! The calls of the host.

use std::{
    collections::{HashMap, HashSet},
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use async_trait::async_trait;
use bulkhead_agent_api::{
    messages::{
        AdjustClockRequest, AdjustClockResponse, ConnectRequest, ContainerRequest,
        CreateContainerRequest, Empty, ExecRequest, InfoRequest, InfoResponse, NetworkRequest,
        OomRequest, OomResponse, ProcessRequest, ReleaseRequest, ResizePtyRequest, ShareRequest,
        SignalRequest, StatsResponse, UpdateRequest, WaitResponse,
    },
    service::Agent,
};
use ttrpc::asynchronous::TtrpcContext;

use oci_spec::runtime::LinuxNamespaceType;

use crate::{
    boot, clock,
    container::{Container, share_path},
    error::ServiceError,
    neighbours::{Neighbours, Networks},
    network::{Network, identity, namespace_of},
    reaper::Reaper,
    serve::Guest,
    volumes,
};

/// Longest name of a container: with the prefix of its cgroup it must fit into a file name.
const ID_MAX: usize = 200;

/// The service, shared by all calls.
pub struct Service(Arc<State>);

struct State {
    guest: Guest,
    reaper: Arc<Reaper>,
    /// `None` while a container is being created.
    containers: Mutex<HashMap<String, Option<Arc<Container>>>>,
    networks: Networks,
    network: Network,
}

impl Service {
    /// A service without containers.
    pub fn new(guest: Guest, reaper: Arc<Reaper>) -> Self {
        Self(Arc::new(State {
            guest,
            reaper,
            containers: Mutex::default(),
            networks: Networks::default(),
            network: Network::default(),
        }))
    }

    /// Runs a call to its end even if the host stops waiting for it, so that no set-up is left
    /// half done.
    async fn finish<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, ServiceError>> + Send + 'static,
    ) -> ttrpc::Result<T> {
        match tokio::spawn(call).await {
            Ok(result) => Ok(result?),
            Err(error) => Err(ttrpc::Error::Others(error.to_string())),
        }
    }
}

impl State {
    fn containers(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Container>>>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, ServiceError> {
        let container = self.containers().get(id).cloned().flatten();
        container.ok_or_else(|| ServiceError::NoContainer(id.to_owned()))
    }

    async fn create(&self, request: CreateContainerRequest) -> Result<(), ServiceError> {
        let id = request.container_id.clone();
        if id.is_empty() || id.len() > ID_MAX || id.contains(['/', '\0']) {
            return Err(ServiceError::BadRequest {
                what: "name of a container",
                value: id,
            });
        }
        if self.containers().contains_key(&id) {
            return Err(ServiceError::ContainerExists(id));
        }
        let neighbours = self.neighbours(&request)?;
        self.containers().insert(id.clone(), None);
        let created = Container::create(
            &self.guest,
            &self.reaper,
            &self.networks,
            request,
            neighbours,
        );
        match created.await {
            Ok(container) => {
                let container = Arc::new(container);
                let sysctls = container.interface_sysctls();
                self.network.expect(container.network(), sysctls).await;
                self.containers().insert(id, Some(Arc::clone(&container)));
                tokio::spawn(async move { container.end_with_init().await });
                Ok(())
            }
            Err(error) => {
                self.containers().remove(&id);
                Err(error)
            }
        }
    }

    fn neighbours(&self, request: &CreateContainerRequest) -> Result<Neighbours, ServiceError> {
        let joined = request.joined_namespaces.iter().map(|joined| {
            let kind = LinuxNamespaceType::try_from(joined.type_.as_str());
            let kind = kind.map_err(|_| ServiceError::BadRequest {
                what: "type of a namespace",
                value: joined.type_.clone(),
            })?;
            self.container(&joined.container_id)?.neighbour(kind)
        });
        Ok(Neighbours(joined.collect::<Result<_, _>>()?))
    }

    async fn delete(&self, request: ProcessRequest) -> Result<(), ServiceError> {
        let container = self.container(&request.container_id)?;
        if !request.exec_id.is_empty() {
            return container.delete_exec(&request.container_id, &request.exec_id);
        }
        container.remove(&self.guest).await?;
        self.containers().remove(&request.container_id);
        self.forget_networks().await;
        Ok(())
    }

    /// Lets go of network namespaces that no container is in.
    async fn forget_networks(&self) {
        let mut living: HashSet<_> = self.networks.kept().await.into_iter().collect();
        for container in self.containers().values().flatten() {
            let namespace = namespace_of(container.init()).and_then(|one| identity(&one));
            // One whose process has ended is in none.
            living.extend(namespace.ok());
        }
        self.network.retain(&living).await;
    }
}

#[async_trait]
impl Agent for Service {
    async fn info(&self, _: &TtrpcContext, _: InfoRequest) -> ttrpc::Result<InfoResponse> {
        Ok(InfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ns: self.0.guest.started_ns,
            ready_ns: self.0.guest.ready_ns,
            kernel_release: boot::kernel_release(),
            ..InfoResponse::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let state = Arc::clone(&self.0);
        self.finish(async move { state.create(request).await })
            .await?;
        Ok(Empty::default())
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        self.finish(async move { container.start().await }).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let state = Arc::clone(&self.0);
        self.finish(async move { container.exec(&state.guest, &state.reaper, request).await })
            .await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.0.container(&request.container_id)?;
        let process = container.process(&request.container_id, &request.exec_id)?;
        let exit = process.wait().await;
        // Another process's end says nothing of the container's.
        let oom_kills = match request.exec_id.is_empty() {
            // Where nothing counts them, nothing limits memory either.
            true => container.oom_kills().unwrap_or(0),
            false => 0,
        };
        Ok(WaitResponse {
            status: exit.status,
            exited_at_ns: exit.at_ns,
            oom_kills,
            ..WaitResponse::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        match (request.exec_id.is_empty(), request.all) {
            (true, true) => container.signal_all(request.signal).await?,
            (true, false) => container.signal(request.signal).await?,
            (false, false) => container
                .process(&request.container_id, &request.exec_id)?
                .signal(request.signal)?,
            (false, true) => {
                return Err(ttrpc::Error::from(ServiceError::BadRequest {
                    what: "signal to all processes of an exec",
                    value: request.exec_id,
                }));
            }
        }
        Ok(Empty::default())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let process = container.process(&request.container_id, &request.exec_id)?;
        let narrow = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        process.resize(narrow(request.width), narrow(request.height))?;
        Ok(Empty::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        let state = Arc::clone(&self.0);
        self.finish(async move { state.delete(request).await })
            .await?;
        Ok(Empty::default())
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: ContainerRequest,
    ) -> ttrpc::Result<StatsResponse> {
        Ok(self.0.container(&request.container_id)?.stats()?)
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        self.finish(async move { container.pause().await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        self.finish(async move { container.resume().await }).await?;
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        self.finish(async move { container.update(&request.resources).await })
            .await?;
        Ok(Empty::default())
    }

    async fn refresh_mirror(
        &self,
        _: &TtrpcContext,
        request: ShareRequest,
    ) -> ttrpc::Result<Empty> {
        let state = Arc::clone(&self.0);
        self.finish(async move { state.guest.mirrors.refresh(&request.share).await })
            .await?;
        Ok(Empty::default())
    }

    async fn release_shares(
        &self,
        _: &TtrpcContext,
        request: ReleaseRequest,
    ) -> ttrpc::Result<Empty> {
        let state = Arc::clone(&self.0);
        self.finish(async move {
            for share in &request.shares {
                let path = share_path(&state.guest.shared_dir, share)?;
                state.guest.mirrors.remove(share).await?;
                volumes::release(path).await?;
            }
            Ok(())
        })
        .await?;
        Ok(Empty::default())
    }

    async fn wait_for_oom(
        &self,
        _: &TtrpcContext,
        request: OomRequest,
    ) -> ttrpc::Result<OomResponse> {
        let container = self.0.container(&request.container_id)?;
        Ok(OomResponse {
            kills: container.wait_for_oom(request.known_kills).await?,
            ..OomResponse::default()
        })
    }

    async fn set_network(&self, _: &TtrpcContext, request: NetworkRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let state = Arc::clone(&self.0);
        self.finish(async move {
            let (process, network) = (container.init(), container.network());
            state
                .network
                .set(&state.guest, process, network, request)
                .await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<Empty> {
        let container = self.0.container(&request.container_id)?;
        let state = Arc::clone(&self.0);
        self.finish(async move {
            let process = container.init();
            state.network.connect(&state.guest, process, &request).await
        })
        .await?;
        Ok(Empty::default())
    }

    async fn adjust_clock(
        &self,
        _: &TtrpcContext,
        request: AdjustClockRequest,
    ) -> ttrpc::Result<AdjustClockResponse> {
        clock::adjust(request.offset_ns).map_err(ServiceError::system("move the clock"))?;
        Ok(AdjustClockResponse {
            now_ns: clock::now(),
            ..AdjustClockResponse::default()
        })
    }
}
