(() => {
  const refresh = async () => {
    try {
      const answer = await fetch('/', { cache: 'no-store' });
      if (!answer.ok) throw new Error(answer.statusText);
      const fresh = new DOMParser().parseFromString(await answer.text(), 'text/html');
      for (const part of ['header', 'main']) {
        const old = document.querySelector(part), now = fresh.querySelector(part);
        if (old.innerHTML !== now.innerHTML) old.replaceWith(now);
      }
      document.body.classList.remove('stale');
    } catch {
      document.body.classList.add('stale');
    }
    setTimeout(refresh, document.hidden ? 10000 : 2000);
  };
  setTimeout(refresh, 2000);
})();
