/** The state that all other plugins show, and the way to the server. */
import type { JupyterFrontEnd, JupyterFrontEndPlugin } from '@jupyterlab/application';
import { PageConfig, URLExt } from '@jupyterlab/coreutils';
import { ServerConnection } from '@jupyterlab/services';

import { Client } from '../client';
import { SandboxesModel } from '../model';
import { ISandboxes } from '../tokens';

export const core: JupyterFrontEndPlugin<ISandboxes> = {
  id: '@sandbox-gateway/labextension:core',
  description: 'Knows the state of the user’s sandboxes.',
  autoStart: true,
  provides: ISandboxes,
  activate: (app: JupyterFrontEnd): ISandboxes => {
    const settings = app.serviceManager.serverSettings;
    // Against caches JupyterLab adds a parameter to each address, which our routes would refuse; to ask the server
    // whether a stored answer still holds does as well.
    const send = (path: string, init: RequestInit) =>
      ServerConnection.makeRequest(URLExt.join(settings.baseUrl, path), { ...init, cache: 'no-cache' }, settings);
    const nameOf = (id: string) =>
      [...app.serviceManager.sessions.running()].find(session => session.kernel?.id === id)?.name;
    const here = PageConfig.getOption('sandboxGateway');
    return new SandboxesModel({
      nameOf,
      remote: here === 'remote',
      client: new Client(send),
      stream: app.serviceManager.events.stream,
      // Our server extension says so in the page, so that a server without it is never asked.
      available: here !== ''
    });
  }
};
